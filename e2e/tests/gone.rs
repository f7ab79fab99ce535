//! Pods that are gone: nothing of them stays open at the other end. And what a program tells of its memory.

use ambit_e2e::{CLIENT, WEB, expect, shop};
use ambit_net::Netns;
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};

const HBONE: &str = ":3AA0";

/// Established connections of a namespace from or to port 15008, by the column of `/proc/net/tcp` that names it.
fn tunnels(netns: &Netns, column: usize) -> Result<usize, Failure> {
    let read = || -> std::io::Result<String> {
        let v4 = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(v4 + &std::fs::read_to_string("/proc/thread-self/net/tcp6")?)
    };
    let table = netns.run(read).doing("enter a namespace")?.doing("read the socket table")?;
    let rows = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    Ok(rows.filter(|r| r.get(3) == Some(&"01") && r.get(column).is_some_and(|a| a.ends_with(HBONE))).count())
}

/// Tunnels that a pod has accepted; the one that it has made.
const ACCEPTED: usize = 1;
const MADE: usize = 2;

fn pod(name: &str, namespace: &str, command: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: node1, containers: [{{name: c, command: {command}}}]}}\n"
    )
}

fn netns(mesh: &Mesh, namespace: &str, name: &str) -> Result<Netns, Failure> {
    let pod = mesh.kubelet.pod(namespace, name).ok_or_else(|| Failure(format!("no {name}")))?;
    Ok(pod.net.netns)
}

#[test]
fn a_client_that_is_gone_leaves_no_tunnel() {
    sandbox::test("a_client_that_is_gone_leaves_no_tunnel", || async {
        let mesh = shop(Options::default()).await?;
        let web = netns(&mesh, "shop", "web")?;
        let before = tunnels(&web, ACCEPTED)?;
        mesh.apply("late.yaml", &pod("late", "front", "[ambit-app, sleep]"))?;
        mesh.ready(&["front/late"]).await?;
        mesh.in_mesh(&["front/late"]).await?;
        expect(&mesh.exec("front/late", &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        mesh.wait("its tunnel", |_| tunnels(&web, ACCEPTED).is_ok_and(|n| n > before)).await?;
        mesh.delete("late.yaml")?;
        mesh.wait("its tunnel to be gone", |_| tunnels(&web, ACCEPTED).is_ok_and(|n| n == before)).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn a_server_that_is_gone_leaves_no_tunnel() {
    sandbox::test("a_server_that_is_gone_leaves_no_tunnel", || async {
        let mesh = shop(Options::default()).await?;
        let client = netns(&mesh, "front", "client")?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        let before = tunnels(&client, MADE)?;
        let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: shop}\n\
                       spec: {selector: {app: late}, ports: [{port: 80, targetPort: 8080}]}\n";
        let serve = "[ambit-app, serve, --port, '8080', --name, late]";
        mesh.apply("late.yaml", &(pod("late", "shop", serve) + service))?;
        mesh.ready(&["shop/late", WEB]).await?;
        mesh.in_mesh(&["shop/late"]).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://late.shop/"]).await?, true, "hello from late")?;
        mesh.wait("a tunnel to it", |_| tunnels(&client, MADE).is_ok_and(|n| n > before)).await?;
        mesh.delete("late.yaml")?;
        mesh.wait("the tunnel to be gone", |_| tunnels(&client, MADE).is_ok_and(|n| n <= before)).await
    });
}

#[test]
fn a_tunnel_started_for_it_tells_where_its_memory_is() {
    sandbox::test("a_tunnel_started_for_it_tells_where_its_memory_is", || async {
        let env = vec![("_RJEM_MALLOC_CONF".to_owned(), "prof:true,lg_prof_sample:12".to_owned())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let profile = mesh.http_get(&mesh.nodes[0].host.netns, 15000, "/debug/pprof/heap")?;
        // Compressed; which of it is text is enough to know a profile by.
        if profile.starts_with('\u{1f}') && profile.len() > 500 {
            Ok(())
        } else {
            Err(Failure(format!("{} bytes: {:?}", profile.len(), profile.chars().take(200).collect::<String>())))
        }
    });
}
