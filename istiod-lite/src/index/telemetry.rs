//! What waypoints tell of requests: Istio's Telemetry, for each service that is bound to one.
//!
//! Owns the meaning of its fields and which object counts: the nearest one for each section (service, Gateway, the
//! waypoint's namespace, class, mesh), and of several as near the oldest.

use std::collections::BTreeMap;

use ambit_model::Str;
use ambit_model::l7::expression;
use ambit_model::l7::log_format::LogFormat;
use ambit_model::l7::telemetry::{LogForm, Metric, MetricRule, Tag, Telemetry};
use ambit_telemetry::peers::HTTP;

use super::guards::attach_to;
use super::l7::{Bound, Owner};
use super::lookup::{Entry, World};
use super::policies::Invalid;
use super::{Condition, Mesh};
use crate::objects::Key;
use crate::objects::istio::PolicyTarget;
use crate::objects::mesh::MeshConfig;
use crate::objects::telemetry::{self as api, Provider};

/// Sections of an object; each is taken whole from the object that counts for it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Sections {
    log: Option<(bool, Option<Str>)>,
    tracing: Option<Tracing>,
    metrics: Option<Vec<MetricRule>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Tracing {
    no_spans: bool,
    sampling: Option<f64>,
    tags: BTreeMap<Str, Tag>,
}

impl Sections {
    fn give(&self, to: &mut Telemetry) {
        if let Some((off, filter)) = &self.log {
            (to.no_log, to.log_filter) = (*off, filter.clone());
        }
        if let Some(tracing) = &self.tracing {
            (to.no_spans, to.sampling, to.tags) = (tracing.no_spans, tracing.sampling, tracing.tags.clone());
        }
        if let Some(metrics) = &self.metrics {
            to.metrics.clone_from(metrics);
        }
    }

    /// A section that both have.
    fn both(&self, other: &Self) -> Option<&'static str> {
        let both = [
            ("accessLogging", self.log.is_some() && other.log.is_some()),
            ("tracing", self.tracing.is_some() && other.tracing.is_some()),
            ("metrics", self.metrics.is_some() && other.metrics.is_some()),
        ];
        both.into_iter().find(|(_, both)| *both).map(|(name, _)| name)
    }
}

/// For what an object holds, the farthest first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach<'a> {
    Mesh,
    Class(&'a str),
    Namespace(&'a str),
    Gateway(&'a str, &'a str),
    Service(&'a str, &'a str, &'a str),
}

/// An object and one of the things that it holds for.
struct Holder<'w, 'a> {
    reach: Reach<'a>,
    target: Option<&'a PolicyTarget>,
    entry: &'w Entry<'a, api::Telemetry>,
    sections: Sections,
}

/// Gives each service what the objects that reach it ask for.
pub(super) fn attach(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    // Objects that say something wrong are not let in; see [`super::validate`].
    let form = log_form(&world.config).ok().flatten();
    for one in bound.values_mut() {
        one.config.telemetry.log_form.clone_from(&form);
    }
    let mut holders: Vec<Holder<'_, '_>> = Vec::new();
    let mut entries: Vec<_> = world.telemetry.iter().collect();
    entries.sort_by_key(|e| e.meta.age());
    let known = |name: &str| world.config.extension_providers.iter().any(|p| p.name == name);
    for entry in entries {
        let sections = match sections(&entry.object.spec, &known) {
            Ok(sections) => sections,
            Err(wrong) => {
                let text = format!("{wrong}; nothing of it is in force");
                say(mesh, entry.key, Condition::no("Accepted", "Invalid", text));
                continue;
            }
        };
        for (reach, target) in reaches(world, entry) {
            if !holders.iter().any(|h| h.reach == reach && h.entry.key == entry.key) {
                holders.push(Holder { reach, target, entry, sections: sections.clone() });
            }
        }
    }
    // The nearest last, and of those as near the oldest: what comes later counts.
    holders.reverse();
    holders.sort_by(|a, b| a.reach.cmp(&b.reach));
    let conditions: Vec<Condition> = holders.iter().map(|holder| give(world, holder, bound)).collect();
    for (n, (holder, condition)) in holders.iter().zip(&conditions).enumerate() {
        // Those that come later and hold for the same are older.
        let older = holders.iter().zip(&conditions).skip(n + 1);
        let mut winners = older.filter(|(h, c)| h.reach == holder.reach && c.status);
        let lost = winners.find_map(|(h, _)| Some((holder.sections.both(&h.sections)?, h.entry.key)));
        let condition = match lost.filter(|_| condition.status) {
            None => condition.clone(),
            Some((section, winner)) => {
                let text =
                    format!("spec.{section}: {}/{} holds for the same and is older", winner.namespace, winner.name);
                Condition::no("Accepted", "Conflicted", text)
            }
        };
        say(mesh, holder.entry.key, condition);
    }
}

/// What does not hold is said before what does.
fn say(mesh: &mut Mesh, key: &Key, condition: Condition) {
    let statuses = mesh.statuses.entry(key.clone()).or_default();
    match statuses.iter_mut().find(|c| c.r#type == condition.r#type) {
        Some(said) if said.status => *said = condition,
        Some(_) => {}
        None => statuses.push(condition),
    }
}

fn reaches<'a>(world: &World<'_>, entry: &Entry<'a, api::Telemetry>) -> Vec<(Reach<'a>, Option<&'a PolicyTarget>)> {
    let spec = &entry.object.spec;
    let targets: Vec<_> = spec.target_ref.iter().chain(&spec.target_refs).collect();
    match targets.is_empty() {
        true if entry.key.namespace == world.config.root_namespace => vec![(Reach::Mesh, None)],
        true => vec![(Reach::Namespace(&entry.key.namespace), None)],
        false => targets.into_iter().map(|t| (reach(entry.key, t), Some(t))).collect(),
    }
}

/// Gives all services that an object reaches what it asks for; what is to be said of it.
fn give(world: &World<'_>, holder: &Holder<'_, '_>, bound: &mut BTreeMap<Owner<'_>, Bound>) -> Condition {
    let Holder { reach, target, entry, sections } = holder;
    if let Some(target) = target {
        let give = |config: &mut ambit_model::l7::ServiceConfig| sections.give(&mut config.telemetry);
        return Condition { r#type: "Accepted", ..attach_to(world, entry.key, target, bound, &give) };
    }
    let mut count = 0;
    let here = |b: &&mut Bound| matches!(reach, Reach::Mesh) || *reach == Reach::Namespace(&b.gateway.0);
    for one in bound.values_mut().filter(here) {
        sections.give(&mut one.config.telemetry);
        count += 1;
    }
    let text = format!("in force for {count} services of waypoints, where nothing nearer is");
    Condition::yes("Accepted", "Accepted", text)
}

/// How waypoints write the access log, where that is said; or the field that is wrong.
pub(super) fn log_form(config: &MeshConfig) -> Result<Option<LogForm>, Invalid> {
    let wrong = |field: &str, value: &str, expected| invalid(format!("data.mesh.{field}"), value, expected);
    if !matches!(config.access_log_file.as_str(), "" | "/dev/stdout") {
        return wrong("accessLogFile", &config.access_log_file, "/dev/stdout");
    }
    let format = config.access_log_format.as_str();
    match config.access_log_encoding.as_str() {
        "JSON" if format.is_empty() => Ok(Some(LogForm::Json)),
        "JSON" => wrong("accessLogFormat", format, "none: JSON has the fields that README names"),
        "" if format.is_empty() => Ok(None),
        "TEXT" if format.is_empty() => Ok(Some(LogForm::Plain)),
        "" | "TEXT" => match LogFormat::parse(format) {
            Ok(_) => Ok(Some(LogForm::Text(format.into()))),
            Err(error) => Err(Invalid {
                path: format!("data.mesh.accessLogFormat: {error}"),
                value: format.to_owned(),
                expected: "text with operators of Istio's default format",
            }),
        },
        other => wrong("accessLogEncoding", other, "TEXT or JSON"),
    }
}

/// Checks what needs no other object.
pub(super) fn validate(spec: &api::TelemetrySpec) -> Result<(), Invalid> {
    sections(spec, &|_| true).map(drop)
}

fn reach<'a>(key: &'a Key, target: &'a PolicyTarget) -> Reach<'a> {
    match &*target.kind {
        "GatewayClass" => Reach::Class(&target.name),
        "Gateway" => Reach::Gateway(&key.namespace, &target.name),
        kind => Reach::Service(kind, &key.namespace, &target.name),
    }
}

fn invalid<T>(path: String, value: &str, expected: &'static str) -> Result<T, Invalid> {
    Err(Invalid { path, value: value.to_owned(), expected })
}

/// Reads an object; `known` says whether the mesh configuration names a provider.
fn sections(spec: &api::TelemetrySpec, known: &dyn Fn(&str) -> bool) -> Result<Sections, Invalid> {
    if spec.selector.is_some() {
        return invalid("spec.selector".into(), "", "targetRefs: waypoints are not chosen by labels of pods");
    }
    let mut of = Sections::default();
    let provider = |path: &str, all: &[Provider], ours: &[&str]| match all
        .iter()
        .enumerate()
        .find(|(_, p)| !ours.contains(&&*p.name) && !known(&p.name))
    {
        Some((n, p)) => {
            let expected = "one that the mesh configuration names; what is told goes where the installation sends it";
            invalid(format!("{path}.providers[{n}].name"), &p.name, expected)
        }
        None => Ok(()),
    };
    let server = |path: String, mode: &str| match mode {
        "" | "CLIENT_AND_SERVER" | "SERVER" => Ok(()),
        mode => invalid(path, mode, "SERVER or CLIENT_AND_SERVER: waypoints tell as servers"),
    };
    let several = |name: &str| invalid(format!("spec.{name}[1]"), "a second one", "one");
    match &spec.access_logging[..] {
        [] => {}
        [log] => {
            provider("spec.accessLogging[0]", &log.providers, &["envoy"])?;
            server("spec.accessLogging[0].match.mode".into(), &log.r#match.mode)?;
            let filter = log.filter.as_ref().map(|f| &*f.expression);
            if let Some(Err(wrong)) = filter.map(expression::parse) {
                let path = "spec.accessLogging[0].filter.expression".to_owned();
                return Err(Invalid {
                    path: format!("{path}: {wrong}"),
                    value: filter.unwrap_or("").into(),
                    expected: "a filter as README describes it",
                });
            }
            of.log = Some((log.disabled == Some(true), filter.map(Str::from)));
        }
        _ => return several("accessLogging"),
    }
    match &spec.tracing[..] {
        [] => {}
        [tracing] => {
            provider("spec.tracing[0]", &tracing.providers, &[])?;
            server("spec.tracing[0].match.mode".into(), &tracing.r#match.mode)?;
            let percentage = tracing.random_sampling_percentage;
            if let Some(wrong) = percentage.filter(|p| !(0.0..=100.0).contains(p)) {
                return invalid("spec.tracing[0].randomSamplingPercentage".into(), &wrong.to_string(), "0 to 100");
            }
            let tags = tracing.custom_tags.iter().map(|(name, tag)| {
                let value = match (&tag.literal, &tag.header) {
                    (Some(literal), None) => Tag::Literal(literal.value.as_str().into()),
                    (None, Some(h)) if !h.name.is_empty() => {
                        Tag::Header(h.name.to_ascii_lowercase().into(), h.default_value.as_str().into())
                    }
                    _ => {
                        return invalid(
                            format!("spec.tracing[0].customTags.{name}"),
                            "",
                            "literal, or header with a name",
                        );
                    }
                };
                Ok((Str::from(name.as_str()), value))
            });
            of.tracing = Some(Tracing {
                no_spans: tracing.disable_span_reporting == Some(true),
                sampling: percentage.map(|p| p / 100.0),
                tags: tags.collect::<Result<_, _>>()?,
            });
        }
        _ => return several("tracing"),
    }
    let mut rules = Vec::new();
    for (n, metrics) in spec.metrics.iter().enumerate() {
        let path = format!("spec.metrics[{n}]");
        provider(&path, &metrics.providers, &["prometheus"])?;
        for (n, change) in metrics.overrides.iter().enumerate() {
            let path = format!("{path}.overrides[{n}]");
            // What clients' proxies are to do is nothing to a waypoint.
            if change.r#match.mode != "CLIENT" {
                server(format!("{path}.match.mode"), &change.r#match.mode)?;
                rules.push(rule(&path, change)?);
            }
        }
    }
    if !spec.metrics.is_empty() {
        of.metrics = Some(rules);
    }
    Ok(of)
}

fn rule(path: &str, change: &api::Override) -> Result<MetricRule, Invalid> {
    let metric = match &*change.r#match.metric {
        "" | "ALL_METRICS" => None,
        "REQUEST_COUNT" => Some(Metric::RequestCount),
        "REQUEST_DURATION" => Some(Metric::RequestDuration),
        "REQUEST_SIZE" => Some(Metric::RequestSize),
        "RESPONSE_SIZE" => Some(Metric::ResponseSize),
        "TCP_OPENED_CONNECTIONS" => Some(Metric::TcpOpened),
        "TCP_CLOSED_CONNECTIONS" => Some(Metric::TcpClosed),
        "TCP_SENT_BYTES" => Some(Metric::TcpSent),
        "TCP_RECEIVED_BYTES" => Some(Metric::TcpReceived),
        other => {
            let expected = "ALL_METRICS, REQUEST_COUNT, REQUEST_DURATION, REQUEST_SIZE, RESPONSE_SIZE, \
                TCP_OPENED_CONNECTIONS, TCP_CLOSED_CONNECTIONS, TCP_SENT_BYTES or TCP_RECEIVED_BYTES";
            return invalid(format!("{path}.match.metric"), other, expected);
        }
    };
    let label = |(name, change): (&String, &api::TagOverride)| {
        let path = format!("{path}.tagOverrides.{name}");
        if !HTTP.contains(&name.as_str()) {
            return invalid(path, name, "a label that the metrics of requests have");
        }
        let quoted = |q: char| change.value.strip_prefix(q)?.strip_suffix(q);
        match (&*change.operation, quoted('\'').or_else(|| quoted('"'))) {
            ("REMOVE", _) => Ok((Str::from(name.as_str()), "".into())),
            ("" | "UPSERT", Some(text)) if !text.contains(['\'', '"']) => Ok((Str::from(name.as_str()), text.into())),
            ("" | "UPSERT", _) => invalid(path, &change.value, "a text in quotes"),
            (other, _) => invalid(path, other, "REMOVE or UPSERT"),
        }
    };
    let labels = change.tag_overrides.iter().map(label).collect::<Result<_, _>>()?;
    Ok(MetricRule { metric, off: change.disabled, labels })
}
