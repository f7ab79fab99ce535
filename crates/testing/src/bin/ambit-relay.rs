//! The least that moves HTTP/1 requests from one connection to another: no TLS, no tunnel, no policy, nothing told. What a bench
//! compares with as the limit of a proxy made of the same libraries.
//!
//! ```text
//! ambit-relay PORT HOST:PORT      two threads; connections to the server are kept
//! ```

use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// Connections that wait for a request.
type Idle = Rc<RefCell<Vec<SendRequest<Incoming>>>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let ([_, target], Some(port)) = (&words[..], words.first().and_then(|p| p.parse::<u16>().ok())) else {
        eprintln!("usage: ambit-relay PORT HOST:PORT, not {args:?}");
        return ExitCode::FAILURE;
    };
    let other = {
        let target = (*target).to_owned();
        std::thread::spawn(move || thread(port, &target))
    };
    let result = thread(port, target).and_then(|()| other.join().unwrap_or_else(|_| Err("a thread has ended".into())));
    if let Err(error) = result {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn thread(port: u16, target: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(port, target))
}

async fn serve(port: u16, target: &str) -> Result<(), String> {
    let socket = tokio::net::TcpSocket::new_v4().map_err(|e| e.to_string())?;
    socket.set_reuseport(true).map_err(|e| e.to_string())?;
    socket.bind(([0, 0, 0, 0], port).into()).map_err(|e| e.to_string())?;
    let listener: TcpListener = socket.listen(1024).map_err(|e| e.to_string())?;
    let (idle, target) = (Idle::default(), Rc::<str>::from(target));
    loop {
        let (stream, _) = listener.accept().await.map_err(|e| e.to_string())?;
        // Without it the answers would still come.
        let _ = stream.set_nodelay(true);
        let (idle, target) = (idle.clone(), target.clone());
        let service = service_fn(move |request| relay(idle.clone(), target.clone(), request));
        tokio::task::spawn_local(async move {
            // How it ends is the client's affair.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn relay(idle: Idle, target: Rc<str>, request: Request<Incoming>) -> Result<Response<Incoming>, String> {
    let kept = idle.borrow_mut().pop().filter(SendRequest::is_ready);
    let mut sender = match kept {
        Some(sender) => sender,
        None => {
            let stream = TcpStream::connect(&*target).await.map_err(|e| e.to_string())?;
            stream.set_nodelay(true).map_err(|e| e.to_string())?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
            tokio::task::spawn_local(async move { drop(connection.await) });
            sender
        }
    };
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    tokio::task::spawn_local(async move {
        if sender.ready().await.is_ok() {
            idle.borrow_mut().push(sender);
        }
    });
    Ok(response)
}
