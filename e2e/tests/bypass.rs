//! An attacker with CAP_NET_RAW: nothing that was not redirected reaches an application of the mesh, or leaves one.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ambit_e2e::{CLIENT, OUTSIDER, WEB, expect, shop};
use ambit_net::capture::Capture;
use ambit_net::{Netns, route};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::segment::{self, ACK, FIN, RST, SYN};
use ambit_testing::{Doing, Failure, sandbox};
use socket2::{Domain, Protocol, Socket, Type};

/// A connection that passes may take so long.
const PATIENCE: Duration = Duration::from_millis(700);

/// What is sent before the ordinary connection, from the same port to the same port.
#[derive(Clone, Copy, Debug)]
enum First {
    Nothing,
    Segment(u8),
    /// With an MD5 signature, for which Linux drops it without an answer.
    Signed(u8),
    Datagram,
}

const FIRST: &[First] = &[
    First::Nothing,
    First::Segment(ACK),
    First::Segment(RST),
    First::Segment(FIN | ACK),
    First::Segment(SYN | ACK),
    First::Segment(SYN | FIN),
    First::Segment(0),
    First::Signed(ACK),
    First::Signed(FIN | ACK),
    First::Signed(SYN | ACK),
    First::Signed(RST | ACK),
    First::Signed(SYN),
    First::Datagram,
];

/// Connects from a port from which something else was sent first, and asks; what the application answers, if it does.
fn attempt(netns: &Netns, from: IpAddr, to: SocketAddr, first: First) -> Result<Option<String>, Failure> {
    let socket = netns.run(|| Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)));
    let socket = socket.doing("enter")?.doing("socket")?;
    socket.set_reuse_address(true).doing("socket")?;
    socket.bind(&SocketAddr::new(from, 0).into()).doing("bind")?;
    let local = socket.local_addr().doing("address")?.as_socket().ok_or_else(|| Failure::new("no address"))?;
    match first {
        First::Nothing => {}
        First::Segment(flags) => segment::send(netns, local, to, flags, false).doing("send")?,
        First::Signed(flags) => segment::send(netns, local, to, flags, true).doing("send")?,
        First::Datagram => {
            let sender = netns.run(|| UdpSocket::bind(local)).doing("enter")?.doing("bind")?;
            sender.send_to(b"x", to).doing("send")?;
        }
    }
    ask(socket, to)
}

fn ask(socket: Socket, to: SocketAddr) -> Result<Option<String>, Failure> {
    if socket.connect_timeout(&to.into(), PATIENCE).is_err() {
        return Ok(None);
    }
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).doing("socket")?;
    let mut answer = String::new();
    let asked = stream.write_all(b"GET /past HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    // Refused connections are reset, before or after the request.
    let _ = asked.and_then(|()| stream.read_to_string(&mut answer));
    Ok(Some(answer).filter(|a| !a.is_empty()))
}

fn net(mesh: &Mesh, pod: &str) -> Result<(Netns, Vec<IpAddr>), Failure> {
    let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
    let pod = mesh.kubelet.pod(namespace, name).ok_or_else(|| Failure(format!("no {pod}")))?;
    Ok((pod.net.netns, pod.net.ips))
}

/// Tries everything from a pod to another, in both families; each answer that came.
fn all_attempts(mesh: &Mesh, from: &str, to: &str, port: u16) -> Result<Vec<String>, Failure> {
    let ((netns, sources), (_, targets)) = (net(mesh, from)?, net(mesh, to)?);
    let mut answers = Vec::new();
    for first in FIRST {
        for (source, target) in sources.iter().zip(&targets) {
            if let Some(answer) = attempt(&netns, *source, SocketAddr::new(*target, port), *first)? {
                answers.push(format!("{first:?} to {target}: {answer}"));
            }
        }
    }
    Ok(answers)
}

/// What a node's metrics say was dropped of a pod.
fn dropped(mesh: &Mesh, node: usize, pod: &str, direction: &str) -> u64 {
    let page = mesh.http_get(&mesh.nodes[node].host.netns, 15020, "/metrics").unwrap_or_default();
    let wanted = [format!("pod=\"{pod}\""), format!("direction=\"{direction}\"")];
    let line = page.lines().find(|l| {
        l.starts_with("ambit_capture_dropped_packets_total{") && wanted.iter().all(|w| l.contains(w.as_str()))
    });
    line.and_then(|l| l.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0)
}

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\n\
    spec: {mtls: {mode: STRICT}}\n";

#[test]
fn no_segment_sent_first_takes_a_connection_past_strict() {
    sandbox::test("no_segment_sent_first_takes_a_connection_past_strict", || async {
        let env = vec![("AUDIT_INTERVAL".to_owned(), "300ms".to_owned())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        mesh.apply("strict.yaml", STRICT)?;
        let in_force = |m: &Mesh| m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()));
        mesh.wait("STRICT at the server's node", in_force).await?;
        for from in [OUTSIDER, CLIENT] {
            // From within the mesh, what is not tried past the redirection is answered.
            let answers = all_attempts(&mesh, from, WEB, 8080)?;
            let past: Vec<&String> = answers.iter().filter(|a| from == OUTSIDER || !a.contains("200 OK")).collect();
            if !past.is_empty() {
                return Err(Failure(format!("from {from}: {past:?}")));
            }
        }
        mesh.wait("what was dropped to be counted", |m| dropped(m, 1, "web", "inbound") > 0).await?;
        let told = |m: &Mesh| m.log("istiod-lite").contains("dropped: ");
        mesh.wait("the controller to be told of it", told).await?;
        // The listeners of the tunnel are reached by redirection alone as well.
        for port in [15001, 15006, 15053] {
            let answers = all_attempts(&mesh, OUTSIDER, WEB, port)?;
            if !answers.is_empty() {
                return Err(Failure(format!("port {port}: {answers:?}")));
            }
        }
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn no_segment_sent_first_takes_a_connection_out_past_the_tunnel() {
    sandbox::test("no_segment_sent_first_takes_a_connection_out_past_the_tunnel", || async {
        let mut mesh = shop(Options::default()).await?;
        mesh.apply(
            "plain.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: server, namespace: outside}\nspec: {nodeName: node2, containers: \
             [{name: c, command: [ambit-app, serve, --port, '8080'], readinessProbe: {tcpSocket: {port: 8080}}}]}\n",
        )?;
        mesh.ready(&["outside/server"]).await?;
        let answers = all_attempts(&mesh, OUTSIDER, "outside/server", 8080)?;
        if answers.len() < FIRST.len() {
            return Err(Failure(format!("between pods outside the mesh all is answered: {answers:?}")));
        }
        // Without its tunnel a pod reaches nothing: what does, went past it.
        mesh.kill_ztunnel(0);
        let answers = all_attempts(&mesh, CLIENT, "outside/server", 8080)?;
        if !answers.is_empty() {
            return Err(Failure(format!("went past the tunnel: {answers:?}")));
        }
        Ok(())
    });
}

/// Two namespaces and a link; the first is to be captured.
fn two() -> Result<(Netns, Netns), Failure> {
    let (pod, attacker) = (Netns::create().doing("netns")?, Netns::create().doing("netns")?);
    let made = pod.run(|| -> std::io::Result<()> {
        route::add_veth("eth0", "eth0", &attacker)?;
        route::add_address("eth0", [192, 0, 2, 1].into(), 24)?;
        route::set_up("lo")?;
        route::set_up("eth0")
    });
    made.doing("enter")?.doing("link")?;
    let made = attacker.run(|| -> std::io::Result<()> {
        route::add_address("eth0", [192, 0, 2, 2].into(), 24)?;
        route::set_up("lo")?;
        route::set_up("eth0")
    });
    made.doing("enter")?.doing("link")?;
    Ok((pod, attacker))
}

/// A connection of which conntrack has seen the pod's packet first: to conntrack, what the attacker sends are replies, and
/// a SYN among them is not tracked at all.
#[test]
fn a_connection_that_is_older_than_the_rules_opens_no_way_for_another() {
    sandbox::test("a_connection_that_is_older_than_the_rules_opens_no_way_for_another", || async {
        let (pod, attacker) = two()?;
        let listener = pod.run(|| TcpListener::bind("192.0.2.1:8080")).doing("enter")?.doing("listen")?;
        let server: SocketAddr = listener.local_addr().doing("address")?;
        let connect = |port: u16| -> Result<Socket, Failure> {
            let socket = attacker.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)));
            let socket = socket.doing("enter")?.doing("socket")?;
            socket.set_reuse_address(true).doing("socket")?;
            socket.bind(&SocketAddr::from(([192, 0, 2, 2], port)).into()).doing("bind")?;
            Ok(socket)
        };
        let old = connect(0)?;
        old.connect_timeout(&server.into(), PATIENCE).doing("connect")?;
        let port = old.local_addr().doing("address")?.as_socket().map(|a| a.port()).unwrap_or_default();
        let (mut accepted, _) = listener.accept().doing("accept")?;
        let capture = Capture::detect(&pod, false).doing("detect")?;
        capture.install(&pod).doing("install")?;
        // Older connections go on, and the pod speaks first.
        let mut old = TcpStream::from(old);
        accepted.write_all(b"still here").doing("write")?;
        let mut got = [0; 10];
        old.read_exact(&mut got).doing("read")?;
        old.write_all(b"me too").doing("write")?;
        accepted.read_exact(&mut got[..6]).doing("read")?;
        socket2::SockRef::from(&old).set_linger(Some(Duration::ZERO)).doing("linger")?;
        drop((old, accepted));
        listener.set_nonblocking(true).doing("listener")?;
        for _ in 0..3 {
            if connect(port)?.connect_timeout(&server.into(), PATIENCE).is_ok() || listener.accept().is_ok() {
                return Err(Failure::new("a connection that was not redirected has reached the application"));
            }
        }
        let found = capture.inspect(&pod).doing("inspect")?;
        if found.dropped.inbound == 0 || found.difference.is_some() {
            return Err(Failure(format!("{found:?}")));
        }
        Ok(())
    });
}
