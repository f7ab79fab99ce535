//! Canary waypoints: a Gateway that takes a share of another one's connections, to try a new version of the waypoint or
//! to replace one by weight.
//!
//! Owns the two annotations and the shares. A canary is told what its primary is told, and its pods are endpoints of the primary's
//! Service besides; how heavy a pod is depends on how many there are of either, so that the weight is that of the
//! canary as a whole.

use serde_json::{Value, json};

use super::lookup::{Entry, World};
use super::{Condition, waypoints};
use crate::objects::Meta;
use crate::objects::gateway::Gateway;

/// Annotation of a Gateway: the one in its namespace of which it takes a share.
const OF: &str = "ambit.dev/canary-of";
/// Annotation beside it: the share, 0 to 100.
const WEIGHT: &str = "ambit.dev/canary-weight";

/// A Gateway's part in a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// A canary of this one.
    Of(&'a str, u32),
    /// This one takes a share.
    With(&'a str, u32),
}

/// What a Gateway asks for; or why it cannot be had.
fn asked<'a>(world: &World<'a>, gateway: &Entry<'a, Gateway>) -> Result<Option<(&'a str, u32)>, String> {
    let Some(of) = gateway.meta.annotation(OF) else { return Ok(None) };
    let text = gateway.meta.annotation(WEIGHT).unwrap_or("0");
    let Some(weight) = text.parse::<u32>().ok().filter(|w| *w <= 100) else {
        return Err(format!("{WEIGHT}: {text:?}, expected a number from 0 to 100"));
    };
    let namespace = gateway.key.namespace.as_str();
    let is_waypoint = |g: &&Entry<'_, Gateway>| g.object.spec.gateway_class_name == waypoints::CLASS;
    match world.gateways.get(&(namespace, of)).filter(is_waypoint) {
        _ if *of == *gateway.key.name => Err(format!("{OF}: it cannot be its own canary")),
        None => Err(format!("{OF}: there is no waypoint {namespace}/{of}")),
        Some(primary) if primary.meta.annotation(OF).is_some() => Err(format!("{OF}: {of} is a canary itself")),
        Some(_) => Ok(Some((of, weight))),
    }
}

/// The part of a Gateway; of several canaries of one the first by name counts.
pub(super) fn part<'a>(world: &World<'a>, namespace: &str, name: &str) -> Option<Part<'a>> {
    let own = world.gateways.get(&(namespace, name))?;
    let canary = canary_of(world, namespace, asked(world, own).ok().flatten().map_or(name, |(of, _)| of))?;
    match asked(world, own).ok().flatten() {
        Some((of, weight)) if *canary.0 == *own.key.name => Some(Part::Of(of, weight)),
        Some(_) => None,
        None => Some(Part::With(canary.0, canary.1)),
    }
}

fn canary_of<'a>(world: &World<'a>, namespace: &str, primary: &str) -> Option<(&'a str, u32)> {
    let here = world.gateways.values().filter(|g| g.key.namespace == namespace);
    here.filter(|g| g.object.spec.gateway_class_name == waypoints::CLASS)
        .find_map(|g| asked(world, g).ok().flatten().filter(|(of, _)| *of == primary).map(|(_, w)| (&*g.key.name, w)))
}

/// What is to be said of a Gateway beside that it is accepted.
pub(super) fn said(world: &World<'_>, gateway: &Entry<'_, Gateway>) -> Result<String, Condition> {
    let no = |text: String| Condition::no("Accepted", "InvalidParameters", format!("{text}; it takes no share"));
    match asked(world, gateway).map_err(no)? {
        None => Ok("a waypoint".into()),
        Some((of, weight)) => match part(world, &gateway.key.namespace, &gateway.key.name) {
            Some(Part::Of(..)) => Ok(format!("a waypoint; {weight} % of the connections of {of}")),
            _ => Err(no(format!("{OF}: {of} has a canary already"))),
        },
    }
}

/// Tells the pods of a canary whose traffic they take besides.
pub(super) fn tell(primary: &str, objects: &mut [Value]) {
    let deployment = objects.iter_mut().find(|o| o["kind"] == "Deployment");
    let env = deployment.map(|d| &mut d["spec"]["template"]["spec"]["containers"][0]["env"]);
    if let Some(env) = env.and_then(Value::as_array_mut) {
        env.push(json!({ "name": "CANARY_OF", "value": primary }));
    }
}

/// How heavy a pod of a waypoint is; and whose Service it is an endpoint of besides.
pub(super) fn pod<'a>(world: &World<'a>, namespace: &str, meta: &Meta) -> (u32, Option<&'a str>) {
    let Some(name) = meta.label(super::gateways::NAME) else { return (1, None) };
    let ready = |name: &str| {
        let of = |p: &&Entry<'_, crate::objects::core::Pod>| {
            *p.key.namespace == *namespace && p.meta.label(super::gateways::NAME) == Some(name)
        };
        let serves = |p: &&Entry<'_, crate::objects::core::Pod>| p.object.ready && p.meta.deletion_timestamp.is_none();
        u32::try_from(world.pods.iter().filter(of).filter(serves).count()).unwrap_or(u32::MAX)
    };
    match part(world, namespace, name) {
        None => (1, None),
        // Where there is no other, it takes all.
        Some(Part::Of(primary, weight)) => match ready(primary) {
            0 => (1, Some(primary)),
            n => (weight.saturating_mul(n), Some(primary)),
        },
        Some(Part::With(canary, weight)) => match ready(canary) {
            0 => (1, None),
            n => ((100 - weight).saturating_mul(n), None),
        },
    }
}
