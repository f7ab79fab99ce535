//! Limits of a tunnel: windows, frames, streams, deadlines.
//!
//! Owns the numbers and their reasons. Reads no configuration itself.

use std::time::Duration;

/// The largest window there is (RFC 9113 section 6.9.1).
pub const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Settings of both ends of a tunnel.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes that one stream may have under way at first. Too small limits a long path; too large lets a bulk stream
    /// queue megabytes in front of a small request.
    pub stream_window: u32,
    /// Up to which the window of a stream may grow where its [path](crate::path) holds more.
    pub max_stream_window: u32,
    /// Bytes that all streams of a tunnel together are to have under way: where there are many, each has a smaller
    /// window. The window of the connection itself is never what limits it, for streams whose readers are slow would
    /// hold all the others.
    pub connection_window: u32,
    /// Largest frame accepted. A batch read from a socket travels as one frame.
    pub max_frame: u32,
    /// Bytes that a stream may buffer before the application has to wait.
    pub send_buffer: usize,
    /// Streams that a peer may open in one tunnel.
    pub max_streams: u32,
    /// Streams that we open in one tunnel before we take another.
    pub streams_per_tunnel: usize,
    /// Tunnels that one pair may have, on one worker, to keep bulk and interactive streams apart.
    pub tunnels_per_peer: usize,
    /// An idle tunnel is closed after this.
    pub idle: Duration,
    /// HTTP/2 preface and settings must be exchanged within this.
    pub handshake: Duration,
    /// The answer to CONNECT must come within this.
    pub answer: Duration,
    /// A ping is sent this often...
    pub ping_every: Duration,
    /// ...and must be answered within this.
    pub ping_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 1024 * 1024,
            max_stream_window: 16 * 1024 * 1024,
            connection_window: 64 * 1024 * 1024,
            max_frame: 1024 * 1024,
            send_buffer: 256 * 1024,
            max_streams: 200,
            streams_per_tunnel: 100,
            tunnels_per_peer: 8,
            idle: Duration::from_secs(300),
            handshake: Duration::from_secs(10),
            answer: Duration::from_secs(20),
            ping_every: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}
