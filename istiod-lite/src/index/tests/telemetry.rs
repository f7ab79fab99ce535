//! Which Telemetry counts for a service, and what is said of it.

use ambit_model::l7::telemetry::{LogForm, Metric, Tag};

use super::l7::{bound_shop, told};
use super::*;

fn telemetry(name: &str, ns: &str, created: &str, spec: &str) -> String {
    format!(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {ns}, \
         creationTimestamp: \"2026-01-0{created}T00:00:00Z\"}}\nspec: {spec}\n---\n"
    )
}

fn said(mesh: &Mesh, name: &str) -> Vec<(bool, &'static str, String)> {
    let of = mesh.statuses.iter().filter(|(k, _)| k.kind == "Telemetry" && k.name == name);
    of.flat_map(|(_, c)| c).map(|c| (c.status, c.reason, c.message.clone())).collect()
}

#[test]
fn the_nearest_object_counts_for_each_section() {
    let yaml = [
        bound_shop("infra"),
        telemetry(
            "mesh",
            "istio-system",
            "1",
            "{accessLogging: [{disabled: true}], tracing: [{randomSamplingPercentage: 50}]}",
        ),
        telemetry("space", "infra", "2", "{accessLogging: [{filter: {expression: response.code >= 400}}]}"),
        telemetry(
            "web",
            "shop",
            "3",
            "{targetRefs: [{group: '', kind: Service, name: web}], tracing: [{disableSpanReporting: true, customTags: \
             {team: {literal: {value: shop}}, user: {header: {name: X-User, defaultValue: nobody}}}}], \
             metrics: [{overrides: [{match: {metric: REQUEST_SIZE}, disabled: true}, {tagOverrides: {response_flags: {operation: REMOVE}, \
             source_app: {value: \"'some'\"}}}]}]}",
        ),
        // The clients' namespace has no waypoint of its own: nothing of this is in force anywhere.
        telemetry("other", "shop", "4", "{accessLogging: [{disabled: true}]}"),
    ];
    let mesh = mesh(&yaml.concat());
    let (web, other) = (&told(&mesh, "web").telemetry, &told(&mesh, "web-v2").telemetry);
    for of in [web, other] {
        assert_eq!((of.no_log, of.log_filter.as_deref()), (false, Some("response.code >= 400")));
    }
    assert_eq!((other.sampling, other.no_spans, other.tags.len(), other.metrics.len()), (Some(0.5), false, 0, 0));
    assert_eq!((web.sampling, web.no_spans), (None, true), "a section is taken whole");
    assert_eq!(web.tags.get("user"), Some(&Tag::Header("x-user".into(), "nobody".into())));
    assert!(!web.counts(Metric::RequestSize) && web.counts(Metric::RequestCount));
    let label = |name: &str| web.label(Metric::RequestCount, name).map(ToString::to_string);
    assert_eq!((label("response_flags"), label("source_app")), (Some(String::new()), Some("some".into())));
    assert!(said(&mesh, "web")[0].0, "{:?}", said(&mesh, "web"));
    assert!(said(&mesh, "other")[0].2.contains("for 0 services"), "{:?}", said(&mesh, "other"));
}

#[test]
fn of_several_as_near_the_oldest_counts_and_the_others_say_so() {
    let target = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]";
    let yaml = [
        bound_shop("shop"),
        telemetry("young", "shop", "5", &format!("{{{target}, accessLogging: [{{disabled: true}}]}}")),
        telemetry("old", "shop", "1", &format!("{{{target}, accessLogging: [{{disabled: false}}]}}")),
        telemetry("apart", "shop", "7", &format!("{{{target}, tracing: [{{randomSamplingPercentage: 1}}]}}")),
    ];
    let mesh = mesh(&yaml.concat());
    let web = &told(&mesh, "web").telemetry;
    assert_eq!((web.no_log, web.sampling), (false, Some(0.01)));
    assert!(said(&mesh, "old")[0].0 && said(&mesh, "apart")[0].0);
    let (good, reason, text) = &said(&mesh, "young")[0];
    assert!(!good && *reason == "Conflicted" && text.contains("shop/old"), "{text}");
}

/// A mistake as it is told when the object is read, so that its last good state stays.
fn refused(spec: &str) -> String {
    let yaml = telemetry("t", "shop", "1", spec);
    match crate::objects::parse::parse(yaml.trim_end_matches("---\n")) {
        Err(error) => error.reason,
        Ok(parsed) => validate(&parsed.object).expect_err(spec).to_string(),
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_path() {
    for (spec, expected) in [
        ("{selector: {matchLabels: {app: web}}}", "spec.selector"),
        ("{accessLogging: [{}, {}]}", "spec.accessLogging[1]"),
        ("{accessLogging: [{filter: {expression: response.size > 1}}]}", "filter.expression: at character 1"),
        ("{accessLogging: [{match: {mode: CLIENT}}]}", "spec.accessLogging[0].match.mode"),
        ("{tracing: [{randomSamplingPercentage: 101}]}", "spec.tracing[0].randomSamplingPercentage: \"101\""),
        ("{tracing: [{customTags: {a: {}}}]}", "spec.tracing[0].customTags.a"),
        ("{tracing: [{customTags: {a: {environment: {name: X}}}}]}", "environment: unknown field"),
        (
            "{metrics: [{overrides: [{match: {metric: GRPC_REQUEST_MESSAGES}}]}]}",
            "spec.metrics[0].overrides[0].match.metric",
        ),
        ("{metrics: [{overrides: [{tagOverrides: {colour: {operation: REMOVE}}}]}]}", "tagOverrides.colour"),
        ("{metrics: [{overrides: [{tagOverrides: {source_app: {value: request.host}}}]}]}", "a text in quotes"),
    ] {
        let reason = refused(spec);
        assert!(reason.contains(expected), "{spec}: {reason}");
    }
    // What the mesh configuration names is known only when all objects are.
    let mesh = mesh(
        &[bound_shop("shop"), telemetry("t", "shop", "1", "{accessLogging: [{providers: [{name: otel}]}]}")].concat(),
    );
    let (good, reason, text) = &said(&mesh, "t")[0];
    assert!(
        !good && *reason == "Invalid" && text.contains("spec.accessLogging[0].providers[0].name: \"otel\""),
        "{text}"
    );
    assert_eq!(told(&mesh, "web").telemetry, Default::default());
}

#[test]
fn one_that_is_not_in_force_takes_nothing_from_others() {
    let class = "targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}]";
    let yaml = [
        bound_shop("shop"),
        // Only the root namespace may name the class.
        telemetry("theirs", "shop", "1", &format!("{{{class}, accessLogging: [{{disabled: true}}]}}")),
        telemetry("ours", "istio-system", "2", &format!("{{{class}, accessLogging: [{{disabled: false}}]}}")),
        // The same target twice is no conflict with itself.
        telemetry(
            "twice",
            "shop",
            "3",
            "{targetRefs: [{group: '', kind: Service, name: web}, {group: '', kind: Service, name: web}], tracing: [{}]}",
        ),
    ];
    let mesh = mesh(&yaml.concat());
    assert!(!said(&mesh, "theirs")[0].0 && said(&mesh, "ours")[0].0, "{:?}", said(&mesh, "ours"));
    assert!(said(&mesh, "twice")[0].0, "{:?}", said(&mesh, "twice"));
    assert!(!told(&mesh, "web").telemetry.no_log);
}

#[test]
fn the_mesh_says_how_waypoints_write_their_log() {
    let config = |mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    {}\n---\n",
            mesh.replace('\n', "\n    ")
        )
    };
    let form = |text: &str| told(&mesh(&[config(text), bound_shop("shop")].concat()), "web").telemetry.log_form.clone();
    assert_eq!(form("accessLogFile: /dev/stdout"), None);
    assert_eq!(form("accessLogEncoding: JSON"), Some(LogForm::Json));
    assert_eq!(form("accessLogEncoding: TEXT"), Some(LogForm::Plain));
    let own = "accessLogFormat: \"%REQ(:METHOD)% %RESPONSE_CODE%\\n\"";
    assert_eq!(form(own), Some(LogForm::Text("%REQ(:METHOD)% %RESPONSE_CODE%\n".into())));
    let refused = |text: &str| {
        // The rest of the configuration holds.
        let made = mesh(&[config(&format!("trustDomain: example.org\n{text}")), bound_shop("shop")].concat());
        assert_eq!(made.config.trust_domain, "example.org");
        let key = Key { kind: "ConfigMap", namespace: "istio-system".into(), name: "istio".into() };
        made.statuses[&key][0].message.clone()
    };
    assert!(
        refused("accessLogFile: /var/log/x").contains("data.mesh.accessLogFile: \"/var/log/x\": expected /dev/stdout")
    );
    assert!(refused("accessLogEncoding: XML").contains("TEXT or JSON"));
    assert!(refused("accessLogEncoding: JSON\naccessLogFormat: '%DURATION%'").contains("none: JSON has"));
    assert!(refused("accessLogFormat: '%WHAT%'").contains("at character 1: \"WHAT\""));
}
