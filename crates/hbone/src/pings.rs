//! Pings of one tunnel: is the peer still there, and how much does the path hold?
//!
//! Owns when a ping is sent, one at a time, what its answer or its lack means, and which window the peer was told of.
//! Polled with the connection, by the same task.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use crate::path::{Path, Sample};
use crate::settings::Settings;

/// What a tunnel moves, shared by its streams and its driver. All of them run on one thread: plain loads and stores are
/// enough, and atomics only let a stream be handed to libraries that ask for it.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Streams that move bulk data.
    pub(crate) bulk: AtomicUsize,
    /// Streams that carry bytes.
    pub(crate) streams: AtomicUsize,
    /// Bytes received by all streams.
    pub(crate) received: AtomicU64,
    /// Which ping is under way; streams count what they receive from its beginning.
    pub(crate) epoch: AtomicU64,
    /// The most that one stream has received in this epoch.
    pub(crate) most: AtomicU64,
}

/// No ping was answered in time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dead;

pub(crate) struct Pings {
    ping: PingPong,
    every: Duration,
    timeout: Duration,
    traffic: Arc<Traffic>,
    path: Path,
    /// The window that the peer was told of last.
    told: u32,
    begin: Instant,
    /// When the ping that is under way was sent, and what had been received then.
    sent: Option<Sample>,
    /// The next ping, or the end of patience with the last one.
    timer: Pin<Box<Sleep>>,
    ended: bool,
}

impl Pings {
    pub(crate) fn new(ping: PingPong, settings: &Settings, traffic: Arc<Traffic>) -> Self {
        Self {
            ping,
            every: settings.ping_every,
            timeout: settings.ping_timeout,
            traffic,
            path: Path::new(settings),
            told: settings.stream_window,
            begin: Instant::now(),
            sent: None,
            timer: Box::pin(tokio::time::sleep(settings.ping_every)),
            ended: false,
        }
    }

    /// Tells the peer of another window, where it is to have one, by `tell`; that may be refused while an earlier
    /// change awaits its answer, and then it is tried again when the connection has something to do. Whether it told.
    pub(crate) fn tell(&mut self, tell: impl FnOnce(u32) -> Result<(), h2::Error>) -> bool {
        let window = self.path.window(self.traffic.streams.load(Relaxed));
        let told = window != self.told && tell(window).is_ok();
        if told {
            self.told = window;
        }
        told
    }

    /// To be polled after the connection, each time.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Dead> {
        while !self.ended {
            let received = self.traffic.received.load(Relaxed);
            let Some(sent) = self.sent else {
                if !self.path.wants_probe(received, || self.begin.elapsed()) {
                    ready!(self.timer.as_mut().poll(cx));
                }
                self.ended = self.ping.send_ping(Ping::opaque()).is_err();
                self.sent = Some(Sample { at: self.begin.elapsed(), received });
                self.traffic.epoch.fetch_add(1, Relaxed);
                self.traffic.most.store(0, Relaxed);
                self.timer.as_mut().reset(Instant::now() + self.timeout);
                continue;
            };
            match self.ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => {
                    self.sent = None;
                    self.timer.as_mut().reset(Instant::now() + self.every);
                    let now = Sample { at: self.begin.elapsed(), received };
                    self.path.answered(sent, now, self.traffic.most.load(Relaxed));
                }
                // The connection has ended; its own future says how.
                Poll::Ready(Err(_)) => self.ended = true,
                Poll::Pending => {
                    ready!(self.timer.as_mut().poll(cx));
                    self.ended = true;
                    return Poll::Ready(Dead);
                }
            }
        }
        Poll::Pending
    }
}
