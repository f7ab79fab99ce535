//! Many streams in one tunnel, some of whose readers have stalled.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_hbone::client::Tunnel;
use ambit_hbone::server::{Incoming, serve};
use ambit_hbone::{Authority, ConnectHeaders, Settings};
use ambit_net::relay::Moved;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio_util::task::TaskTracker;

const MIB: u32 = 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(20);

/// Two ends of a connection on loopback.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
    (ours.expect("connect"), theirs.expect("accept").0)
}

/// An application that sends as many bytes as the port of the authority says MiB, and then ends.
async fn source(mut app: TcpStream, mib: u16) {
    let chunk = vec![7; MIB as usize];
    for _ in 0..mib {
        if app.write_all(&chunk).await.is_err() {
            return;
        }
    }
    let _ = app.shutdown().await;
}

/// A tunnel to a server whose applications are [`source`]s, over a pipe.
async fn tunnel(settings: &Settings) -> Arc<Tunnel> {
    let (ours, theirs) = tokio::io::duplex(MIB as usize);
    let server = settings.clone();
    spawn_local(async move {
        let handle = |incoming: Incoming| {
            spawn_local(async move {
                let (app, tunnel_side) = pair().await;
                spawn_local(source(app, incoming.authority.port()));
                let _ = incoming.accept(&ConnectHeaders::default(), tunnel_side, &Moved::default()).await;
            });
        };
        let _ = serve(theirs, &server, std::future::pending(), handle).await;
    });
    let never = SystemTime::now() + Duration::from_secs(3600);
    Arc::new(Tunnel::start(ours, settings, never, &TaskTracker::new()).await.expect("starts"))
}

/// Opens a stream and answers the application's end of it.
async fn open(tunnel: &Arc<Tunnel>, mib: u16, settings: &Settings) -> TcpStream {
    let to = Authority::Host("source".to_owned(), mib);
    let stream = tunnel.place().open(&to, &ConnectHeaders::default(), settings).await.expect("opens");
    let (app, tunnel_side) = pair().await;
    spawn_local(async move { stream.carry(tunnel_side, &Moved::default()).await });
    app
}

async fn read_all(mut app: TcpStream) -> usize {
    let mut all = Vec::new();
    tokio::time::timeout(PATIENCE, app.read_to_end(&mut all)).await.expect("in time").expect("reads");
    all.len()
}

#[test]
fn streams_with_stalled_readers_do_not_hold_the_others() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    LocalSet::new().block_on(&runtime, async {
        // All that streams share is used up many times over by those that stall, though each holds its share only.
        let settings = Settings { connection_window: 2 * MIB, ..Settings::default() };
        let tunnel = tunnel(&settings).await;
        let mut stalled = Vec::new();
        for _ in 0..64 {
            let app = open(&tunnel, 24, &settings).await;
            tokio::time::timeout(PATIENCE, app.peek(&mut [0])).await.expect("in time").expect("a first byte");
            stalled.push(app);
        }
        for _ in 0..8 {
            assert_eq!(read_all(open(&tunnel, 4, &settings).await).await, 4 * MIB as usize);
        }
        // Windows have shrunk, some of them below nothing; now they grow again, while data moves.
        while stalled.len() > 2 {
            drop(stalled.pop());
            let other = stalled.pop().expect("an even number");
            assert_eq!(read_all(other).await, 24 * MIB as usize);
        }
        let (one, other) = (stalled.pop().expect("one"), stalled.pop().expect("another"));
        let (one, other) = tokio::join!(read_all(one), read_all(other));
        assert_eq!((one, other), (24 * MIB as usize, 24 * MIB as usize));
    });
}
