//! Pings of one tunnel: is the peer still there, and how much does the path hold?
//!
//! Owns when a ping is sent, one at a time, and what its answer or its lack means. Polled with the connection, by the
//! same task.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use crate::path::Path;
use crate::settings::Settings;

/// What a tunnel moves, shared by its streams and its driver.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Streams that move bulk data.
    pub(crate) bulk: Cell<usize>,
    /// Bytes received by all streams.
    pub(crate) received: Cell<u64>,
}

/// What the connection is to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Give streams this window.
    Window(u32),
    /// Give up: no answer in time.
    Dead,
}

pub(crate) struct Pings {
    ping: PingPong,
    every: Duration,
    timeout: Duration,
    traffic: Rc<Traffic>,
    path: Path,
    begin: Instant,
    /// When the ping that is under way was sent, and what had been received then.
    sent: Option<(Duration, u64)>,
    /// The next ping, or the end of patience with the last one.
    timer: Pin<Box<Sleep>>,
    ended: bool,
}

impl Pings {
    pub(crate) fn new(ping: PingPong, settings: &Settings, traffic: Rc<Traffic>) -> Self {
        Self {
            ping,
            every: settings.ping_every,
            timeout: settings.ping_timeout,
            traffic,
            path: Path::new(settings.stream_window, settings.max_stream_window),
            begin: Instant::now(),
            sent: None,
            timer: Box::pin(tokio::time::sleep(settings.ping_every)),
            ended: false,
        }
    }

    /// To be polled after the connection, each time.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        while !self.ended {
            let received = self.traffic.received.get();
            let Some(sent) = self.sent else {
                if !self.path.wants_probe(received, || self.begin.elapsed()) {
                    ready!(self.timer.as_mut().poll(cx));
                }
                self.ended = self.ping.send_ping(Ping::opaque()).is_err();
                self.sent = Some((self.begin.elapsed(), received));
                self.timer.as_mut().reset(Instant::now() + self.timeout);
                continue;
            };
            match self.ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => {
                    self.sent = None;
                    self.timer.as_mut().reset(Instant::now() + self.every);
                    if let Some(window) = self.path.answered(sent, (self.begin.elapsed(), received)) {
                        return Poll::Ready(Event::Window(window));
                    }
                }
                // The connection has ended; its own future says how.
                Poll::Ready(Err(_)) => self.ended = true,
                Poll::Pending => {
                    ready!(self.timer.as_mut().poll(cx));
                    self.ended = true;
                    return Poll::Ready(Event::Dead);
                }
            }
        }
        Poll::Pending
    }
}
