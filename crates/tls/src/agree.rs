//! The handshake: rustls's decisions, our reads and writes.
//!
//! Owns how many bytes rustls sees: never more than the record it asks for, so that what the peer says after its part of the
//! handshake is left for [`crate::stream`]. A peer whose handshake fails is told why. Has no deadline.

use std::io;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of a handshake's records that may wait for the rest of a message: more than rustls takes of one.
const MAX_WAITING: usize = 128 * 1024;
/// Bytes of a record after its header, as any version of TLS has them.
const MAX_RECORD: usize = 16 * 1024 + 2048;
/// Bytes asked of the socket at a time.
const READ: usize = 4 * 1024;

/// One side of a handshake.
pub(crate) trait Side {
    /// rustls's data of a side.
    type Data;

    /// Goes on with what was received.
    fn step<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether there is something to send, so that the next step does nothing but say what.
    fn has_to_say(&self) -> bool;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn step<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn has_to_say(&self) -> bool {
        self.wants_write()
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn step<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn has_to_say(&self) -> bool {
        self.wants_write()
    }
}

/// What is to be done before the next step.
enum Then {
    Go,
    Send,
    Read,
    Done,
    Fail(io::Error),
}

/// Runs the handshake to its end; what has been received after it.
pub(crate) async fn agree<C: Side, S>(side: &mut C, stream: &mut S) -> io::Result<Vec<u8>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Of what was received rustls is shown the first bytes only.
    let (mut received, mut shown, mut out) = (Vec::new(), 0, Vec::new());
    loop {
        let UnbufferedStatus { discard, state, .. } = side.step(&mut received[..shown]);
        let then = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => match encode(&mut data, &mut out) {
                Ok(()) => Then::Go,
                Err(error) => Then::Fail(error),
            },
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Then::Send
            }
            Ok(ConnectionState::BlockedHandshake) => Then::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Then::Done,
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                Then::Fail(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(_) => Then::Fail(io::Error::new(io::ErrorKind::InvalidData, "data before the end of the handshake")),
            Err(error) => Then::Fail(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        received.drain(..discard);
        shown -= discard;
        match then {
            Then::Go => {}
            Then::Send => {
                stream.write_all(&out).await?;
                stream.flush().await?;
                out.clear();
            }
            Then::Read => shown = another(stream, &mut received, shown).await?,
            // The last message of a handshake ends with its record (RFC 8446 section 5.1), which is then done with.
            Then::Done if shown == 0 => return Ok(received),
            Then::Done => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "more after the last handshake message"));
            }
            Then::Fail(error) => {
                // Only what is to be said of it: to look at the same bytes again would fail again.
                while side.has_to_say() && out.len() < MAX_WAITING {
                    let UnbufferedStatus { discard, state, .. } = side.step(&mut received[..shown]);
                    let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { break };
                    if encode(&mut data, &mut out).is_err() {
                        break;
                    }
                    received.drain(..discard);
                    shown -= discard;
                }
                if stream.write_all(&out).await.is_ok() {
                    let _ = stream.flush().await;
                }
                return Err(error);
            }
        }
    }
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> io::Result<()> {
    let start = out.len();
    let mut room = 0;
    for _ in 0..2 {
        out.resize(start + room, 0);
        match data.encode(&mut out[start..]) {
            Ok(n) => {
                out.truncate(start + n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) => room = needed.required_size,
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Err(io::Error::other("rustls asks for more room than it has said"))
}

/// Reads until there is one whole record more than `shown`; where that ends.
async fn another<S: AsyncRead + Unpin>(stream: &mut S, received: &mut Vec<u8>, shown: usize) -> io::Result<usize> {
    loop {
        if let [kind, major, _, high, low, ..] = received[shown..] {
            let length = usize::from(u16::from_be_bytes([high, low]));
            // No TLS: rustls is to see it, and to say so.
            if !(20..=23).contains(&kind) || major != 3 || length > MAX_RECORD {
                return Ok(received.len());
            }
            let end = shown + 5 + length;
            if end > MAX_WAITING {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a handshake message that is too long"));
            }
            if received.len() >= end {
                return Ok(end);
            }
        }
        received.reserve(READ);
        if stream.read_buf(received).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
