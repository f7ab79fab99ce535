//! What crosses a link: every packet, really captured with a packet socket, kept to be searched.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::sys::socket::{self, AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Doing, Failure};

/// A TCP segment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Source port.
    pub from: u16,
    /// Destination port.
    pub to: u16,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A running capture of one link, in the namespace of the thread that started it.
pub struct Capture {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts to capture.
    pub fn start(link: &str) -> Result<Self, Failure> {
        let fd = socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .doing("open a packet socket")?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).doing("packet socket")?;
        let _ = setsockopt(&fd, sockopt::RcvBuf, &(8 << 20));
        let index = nix::net::if_::if_nametoindex(link).doing(link)?;
        let frames: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (kept, stopped) = (frames.clone(), stop.clone());
        let reader = std::thread::spawn(move || {
            let mut buf = vec![0; 128 * 1024];
            while !stopped.load(Ordering::Relaxed) {
                // The socket hears all links of the namespace; the address says which one it was.
                let Ok((n, from)) = socket::recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut buf) else { continue };
                if from.is_some_and(|a| a.ifindex() == index as usize) {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(buf[..n].to_vec());
                }
            }
        });
        Ok(Self { frames, stop, reader: Some(reader) })
    }

    /// Ends the capture and returns all frames.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        // What is on its way arrives within one round of the reader.
        std::thread::sleep(std::time::Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        std::mem::take(&mut *self.frames.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The TCP segments among frames, of IPv4 and IPv6.
pub fn segments(frames: &[Vec<u8>]) -> Vec<Segment> {
    frames.iter().filter_map(|f| segment(f)).collect()
}

fn segment(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(14..)?;
    let tcp = match frame.get(12..14)? {
        [8, 0] if *packet.get(9)? == 6 => {
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            packet.get(usize::from(packet[0] & 15) * 4..total.min(packet.len()))?
        }
        [0x86, 0xdd] if *packet.get(6)? == 6 => packet.get(40..)?,
        _ => return None,
    };
    let offset = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Segment {
        from: u16::from_be_bytes([tcp[0], tcp[1]]),
        to: u16::from_be_bytes([tcp[2], tcp[3]]),
        payload: tcp.get(offset..)?.to_vec(),
    })
}

/// Whether any frame holds these bytes.
pub fn holds(frames: &[Vec<u8>], needle: &[u8]) -> bool {
    frames.iter().any(|f| f.windows(needle.len()).any(|w| w == needle))
}
