//! Envoy in the role of a waypoint, in our mesh: its certificate and its configuration.
//!
//! Owns a configuration with the settings that Istio's waypoint has (three listeners, 100 streams, keepalive, its filters, its
//! own statistics switched off), and what ours does as well: a policy, an access log in JSON. Never part of the product.

use std::net::IpAddr;
use std::path::Path;

use ambit_testing::{Doing, Failure};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};

/// What it serves.
pub struct Service {
    /// Virtual address.
    pub vip: IpAddr,
    /// The pod behind it.
    pub pod: IpAddr,
    /// Service port, target port, and whether HTTP/2 is spoken to the pod.
    pub ports: Vec<(u16, u16, bool)>,
    /// Rules of each port; only the last one matches what the bench asks for.
    pub rules: usize,
}

/// Writes certificate and configuration into a directory. `state` is the controller's.
pub fn write(state: &Path, to: &Path, service: &Service) -> Result<(), Failure> {
    std::fs::create_dir_all(to).doing("directory of Envoy")?;
    let read = |name: &str| std::fs::read_to_string(state.join("ca").join(name)).doing(name);
    let (root, key) = (read("root-cert.pem")?, read("ca-key.pem")?);
    let key = KeyPair::from_pem(&key).doing("key of the authority")?;
    let issuer = Issuer::from_ca_cert_pem(&root, key).doing("certificate of the authority")?;
    let mut params = CertificateParams::default();
    let name = "spiffe://cluster.local/ns/bench/sa/waypoint".try_into().doing("identity")?;
    params.subject_alt_names = vec![SanType::URI(name)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let own = KeyPair::generate().doing("key")?;
    let certificate = params.signed_by(&own, &issuer).doing("sign")?;
    for (file, text) in [("own.crt", certificate.pem()), ("own.key", own.serialize_pem()), ("ca.crt", root)] {
        std::fs::write(to.join(file), text).doing(file)?;
    }
    let config = serde_json::to_string(&config(to, service)).doing("configuration")?;
    std::fs::write(to.join("envoy.json"), config).doing("envoy.json")
}

const EXTENSIONS: &str = "type.googleapis.com/envoy.extensions.";

fn typed(name: &str, kind: &str, mut fields: Value) -> Value {
    let kind = if kind.contains('/') { kind.to_owned() } else { format!("{EXTENSIONS}{kind}") };
    fields["@type"] = json!(kind);
    json!({ "name": name, "typed_config": fields })
}

fn tls(dir: &Path, down: bool) -> Value {
    let file = |name: &str| json!({ "filename": dir.join(name) });
    let common = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{ "certificate_chain": file("own.crt"), "private_key": file("own.key") }],
        "validation_context": {
            "trusted_ca": file("ca.crt"),
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "prefix": "spiffe://cluster.local/" } }],
        },
    });
    match down {
        true => typed(
            "tls",
            "transport_sockets.tls.v3.DownstreamTlsContext",
            json!({ "common_tls_context": common, "require_client_certificate": true }),
        ),
        false => typed("tls", "transport_sockets.tls.v3.UpstreamTlsContext", json!({ "common_tls_context": common })),
    }
}

fn h2_options(options: Value) -> Value {
    json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": format!("{EXTENSIONS}upstreams.http.v3.HttpProtocolOptions"),
        "common_http_protocol_options": { "idle_timeout": "3600s" },
        "explicit_http_config": { "http2_protocol_options": options },
    } })
}

fn cluster(name: &str, kind: &str, mut more: Value) -> Value {
    let most = u32::MAX;
    more["name"] = json!(name);
    more["type"] = json!(kind);
    more["connect_timeout"] = json!("10s");
    more["circuit_breakers"] = json!({ "thresholds": [{
        "max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most, "track_remaining": true,
    }] });
    more
}

/// An endpoint that is a listener inside; `pod` is told to its filter as the original destination.
fn inner(listener: &str, name: &str, pod: Option<String>) -> Value {
    let address = json!({ "server_listener_name": listener, "endpoint_id": pod.clone().unwrap_or_default() });
    let mut endpoint = json!({ "endpoint": { "address": { "envoy_internal_address": address } } });
    if let Some(pod) = pod {
        endpoint["metadata"] =
            json!({ "filter_metadata": { "envoy.filters.listener.original_dst": { "local": pod } } });
    }
    json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] })
}

fn inner_socket(metadata: &[&str]) -> Value {
    let passed: Vec<Value> = metadata.iter().map(|n| json!({ "name": n, "kind": { "host": {} } })).collect();
    let raw = typed("raw_buffer", "transport_sockets.raw_buffer.v3.RawBuffer", json!({}));
    typed(
        "internal_upstream",
        "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        json!({ "passthrough_metadata": passed, "transport_socket": raw }),
    )
}

fn manager(name: &str, routes: Vec<Value>, filters: Vec<Value>, mut more: Value) -> Value {
    let router = typed("router", "filters.http.router.v3.Router", json!({}));
    more["stat_prefix"] = json!(name);
    more["stream_idle_timeout"] = json!("0s");
    more["use_remote_address"] = json!(false);
    more["server_name"] = json!("istio-envoy");
    more["server_header_transformation"] = json!("PASS_THROUGH");
    more["http_filters"] = filters.into_iter().chain([router]).collect();
    more["route_config"] = json!({
        "name": name, "validate_clusters": false,
        "virtual_hosts": [{ "name": name, "domains": ["*"], "routes": routes }],
    });
    typed("hcm", "filters.network.http_connection_manager.v3.HttpConnectionManager", more)
}

/// Rules as ours has them: each with a path prefix and a header of its own.
fn rules(n: usize, to: &str) -> Vec<Value> {
    let retry = json!({ "retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2 });
    let one = |i: usize| {
        let header = json!({ "name": "x-rule", "string_match": { "exact": format!("r{i}") } });
        json!({
            "name": format!("rule-{i}"),
            "match": { "path_separated_prefix": format!("/api/s{i}"), "headers": [header] },
            "route": { "cluster": to, "timeout": "0s", "retry_policy": retry },
        })
    };
    (0..n).map(one).collect()
}

fn access_log() -> Value {
    let word = |w: &str| json!(format!("%{w}%"));
    typed(
        "log",
        "access_loggers.stream.v3.StdoutAccessLog",
        json!({ "log_format": { "json_format": {
            "time": word("START_TIME"), "method": word("REQ(:METHOD)"), "path": word("REQ(:PATH)"),
            "host": word("REQ(:AUTHORITY)"), "status": word("RESPONSE_CODE"), "flags": word("RESPONSE_FLAGS"),
            "src": word("DOWNSTREAM_REMOTE_ADDRESS"), "dst": word("UPSTREAM_HOST"), "route": word("ROUTE_NAME"),
            "bytes_sent": word("BYTES_SENT"), "bytes_recv": word("BYTES_RECEIVED"), "duration": word("DURATION"),
            "trace": word("REQ(TRACEPARENT)"),
        } } }),
    )
}

fn config(dir: &Path, service: &Service) -> Value {
    let original_dst = typed("original_dst", "filters.listener.original_dst.v3.OriginalDst", json!({}));
    let tcp = |name: &str, to: &str, mut more: Value| {
        more["stat_prefix"] = json!(name);
        more["cluster"] = json!(to);
        typed("tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy", more)
    };
    let (mut chains, mut ports, mut clusters) = (Vec::new(), serde_json::Map::new(), Vec::new());
    for (port, target, h2) in &service.ports {
        let name = format!("inbound-vip|{port}|http|server.bench.svc.cluster.local");
        let pod = format!("{}:{target}", service.pod);
        let mut more = json!({
            "lb_policy": "LEAST_REQUEST",
            "transport_socket": inner_socket(&["envoy.filters.listener.original_dst", "istio"]),
            "load_assignment": inner("connect_originate", &name, Some(pod)),
        });
        if *h2 {
            more["typed_extension_protocol_options"] = h2_options(json!({ "max_concurrent_streams": 1_073_741_824 }));
        }
        clusters.push(cluster(&name, "STATIC", more));
        let deny = json!({ "rules": { "action": "DENY", "policies": { "no-admin": {
            "permissions": [{ "url_path": { "path": { "prefix": "/admin" } } }], "principals": [{ "any": true }],
        } } } });
        let filters = vec![
            typed("rbac", "filters.http.rbac.v3.RBAC", deny),
            typed(
                "grpc_stats",
                "filters.http.grpc_stats.v3.FilterConfig",
                json!({ "emit_filter_state": true, "stats_for_all_methods": false }),
            ),
            typed("fault", "filters.http.fault.v3.HTTPFault", json!({})),
            typed("cors", "filters.http.cors.v3.Cors", json!({})),
        ];
        let more = json!({
            "codec_type": "AUTO", "normalize_path": true, "upgrade_configs": [{ "upgrade_type": "websocket" }],
            "forward_client_cert_details": "SANITIZE", "access_log": [access_log()],
        });
        chains.push(json!({ "name": name, "filters": [manager(&name, rules(service.rules, &name), filters, more)] }));
        let to = typed("chain", "type.googleapis.com/google.protobuf.StringValue", json!({ "value": name }));
        ports.insert(port.to_string(), json!({ "action": to }));
    }
    let input = |kind: &str| typed("input", &format!("matching.common_inputs.network.v3.{kind}"), json!({}));
    let by_port = json!({ "matcher": { "matcher_tree": {
        "input": input("DestinationPortInput"), "exact_match_map": { "map": ports },
    } } });
    let by_ip = typed(
        "ip",
        "type.googleapis.com/xds.type.matcher.v3.IPMatcher",
        json!({ "range_matchers": [{
            "ranges": [{ "address_prefix": service.vip, "prefix_len": 32 }], "on_match": by_port,
        }] }),
    );
    let connect = json!({
        "match": { "connect_matcher": {} },
        "route": { "cluster": "main_internal", "timeout": "0s", "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }] },
    });
    let state = |key: &str, format: &str| {
        json!({
            "object_key": key, "shared_with_upstream": "ONCE",
            "format_string": { "text_format_source": { "inline_string": format } },
        })
    };
    let authority = typed(
        "connect_authority",
        "filters.http.set_filter_state.v3.Config",
        json!({ "on_request_headers": [
            state("envoy.filters.listener.original_dst.local_ip", "%REQ(:AUTHORITY)%"),
            state("envoy.filters.listener.original_dst.remote_ip", "%DOWNSTREAM_REMOTE_ADDRESS%"),
        ] }),
    );
    let more = json!({
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "http2_protocol_options": {
            "allow_connect": true, "max_concurrent_streams": 100,
            "connection_keepalive": { "interval": "10s", "timeout": "20s" },
        },
    });
    let terminate = manager("connect_terminate", vec![connect], vec![authority], more);
    let tunnel = json!({ "tunneling_config": { "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%" } });
    let listeners = json!([
        {
            "name": "connect_terminate",
            "address": { "socket_address": { "address": "0.0.0.0", "port_value": 15008 } },
            "connection_balance_config": { "exact_balance": {} },
            "filter_chains": [{ "transport_socket": tls(dir, true), "filters": [terminate] }],
        },
        {
            "name": "main_internal", "internal_listener": {}, "listener_filters": [original_dst],
            "traffic_direction": "INBOUND",
            "filter_chain_matcher": { "matcher_tree": { "input": input("DestinationIPInput"), "custom_match": by_ip } },
            "filter_chains": chains,
        },
        {
            "name": "connect_originate", "internal_listener": {}, "listener_filters": [original_dst],
            "filter_chains": [{ "filters": [tcp("connect_originate", "connect_originate", tunnel)] }],
        },
    ]);
    clusters.push(cluster(
        "main_internal",
        "STATIC",
        json!({ "load_assignment": inner("main_internal", "main_internal", None), "transport_socket": inner_socket(&[]) }),
    ));
    clusters.push(cluster(
        "connect_originate",
        "ORIGINAL_DST",
        json!({
            "lb_policy": "CLUSTER_PROVIDED", "cleanup_interval": "60s",
            "original_dst_lb_config": { "upstream_port_override": 15008 },
            "transport_socket": tls(dir, false),
            "typed_extension_protocol_options": h2_options(json!({ "allow_connect": true })),
        }),
    ));
    let kept = ["reporter=", "cluster_manager", "listener_manager", "server", "component", "istio"];
    let kept: Vec<Value> = kept.iter().map(|p| json!({ "prefix": p })).collect();
    json!({
        "node": { "id": "waypoint", "cluster": "bench" },
        "bootstrap_extensions": [typed("internal_listener", "bootstrap.internal_listener.v3.InternalListener", json!({ "buffer_size_kb": 64 }))],
        "static_resources": { "listeners": listeners, "clusters": clusters },
        "stats_config": { "use_all_default_tags": false, "stats_matcher": { "inclusion_list": { "patterns": kept } } },
    })
}
