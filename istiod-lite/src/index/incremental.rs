//! The next mesh from the last one.
//!
//! Owns what may be kept: where only pods differ (they come, go and change all the time), their own rows are made anew
//! and nothing else is looked at. Any other change makes the whole mesh; rows that come out equal stay the same piece of
//! memory, so that nothing is encoded or sent because of it. The result is always that of [`super::build`].

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use super::claims::Claims;
use super::lookup::{ENDPOINTS, Entry, World};
use super::ownership::Ownership;
use super::policies::Authentication;
use super::{Enrolled, Mesh, Settings, build_with, gateways, pods, routes};
use crate::objects::all::Change;
use crate::objects::mesh::MeshConfig;
use crate::objects::{Key, Loaded, Object, Objects, core};

/// Makes meshes, one after the other.
pub struct Index {
    settings: Settings,
    known: routes::Known,
    last: Option<Last>,
    /// The mesh configuration that is in force; it stays while a later one cannot be read.
    config: Option<MeshConfig>,
}

struct Last {
    objects: Objects,
    enrolled: Enrolled,
    mesh: Mesh,
}

impl Index {
    /// Has made none yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, known: routes::Known::default(), last: None, config: None }
    }

    /// The mesh of these objects and reports.
    pub fn update(&mut self, objects: &Objects, enrolled: &Enrolled) -> Mesh {
        let (known, config) = (&mut self.known, self.config.as_ref());
        let mesh = match &self.last {
            None => build_with(objects, enrolled, &self.settings, known, config),
            Some(last) => {
                known.follow(objects, &last.objects);
                last.follow(objects, enrolled, &self.settings).unwrap_or_else(|| {
                    let mut mesh = build_with(objects, enrolled, &self.settings, known, config);
                    reuse(&mut mesh, &last.mesh);
                    mesh
                })
            }
        };
        self.last = Some(Last { objects: objects.clone(), enrolled: enrolled.clone(), mesh: mesh.clone() });
        mesh
    }
}

impl Index {
    /// What was made last is in force: all objects had been read.
    pub fn settle(&mut self) {
        if let Some(last) = &self.last {
            self.config = Some((*last.mesh.config).clone());
        }
    }
}

fn reuse(mesh: &mut Mesh, old: &Mesh) {
    mesh.workloads.reuse(&old.workloads);
    mesh.services.reuse(&old.services);
    mesh.bound.reuse(&old.bound);
    mesh.policies.reuse(&old.policies);
    mesh.node_pods.reuse(&old.node_pods);
    mesh.namespaces.reuse(&old.namespaces);
}

impl Last {
    /// The next mesh, where only pods differ and nothing else depends on those.
    fn follow(&self, objects: &Objects, enrolled: &Enrolled, settings: &Settings) -> Option<Mesh> {
        // A source may have put its lists together anew though nothing in them is.
        let changed = |kind: &&str| !ENDPOINTS.contains(kind) && !objects.changes(&self.objects, kind).is_empty();
        if objects.kinds_changed(&self.objects).any(|kind| changed(&kind)) {
            return None;
        }
        let world = World::new(objects, settings, (*self.mesh.config).clone(), ENDPOINTS);
        let alone = |c: &Change<'_>| [c.old, c.new].into_iter().flatten().all(|o| self.stands_alone(&world, c.key, o));
        if !objects.changes(&self.objects, "EndpointSlice").iter().all(alone) {
            return None;
        }
        let mut changes = objects.changes(&self.objects, "Pod");
        let reported = self.reported(enrolled);
        if !reported.is_empty() {
            let concerned = |o: &Loaded| reported.contains(&*o.meta.uid);
            let same = objects.of("Pod").iter().filter(|(_, o)| concerned(o));
            // One that has changed as well is followed once more than needed.
            changes.extend(same.map(|(key, o)| Change { key, old: Some(o), new: Some(o) }));
        }
        if !changes.iter().all(alone) {
            return None;
        }
        let mut mesh = self.mesh.clone();
        // What authentication says of itself has been said.
        let authentication = Authentication::new(&world, &mut Mesh::default());
        // Pods that claims depend on do not stand alone; of the others nothing is asked.
        let (claims, _) = Claims::new(&world, &Ownership::new(&world));
        let context = pods::Context::new(&world, enrolled, &authentication, &claims);
        for change in &changes {
            let old = change.old.and_then(|o| pod(&world, change.key, o));
            let new = change.new.and_then(|o| pod(&world, change.key, o));
            pods::follow(&context, old.as_ref(), new.as_ref(), &mut mesh);
        }
        Some(mesh)
    }

    /// Uids of pods of which another thing is reported than before.
    fn reported<'a>(&'a self, enrolled: &'a Enrolled) -> BTreeSet<&'a str> {
        static NONE: LazyLock<Arc<BTreeSet<String>>> = LazyLock::new(Arc::default);
        let nodes: BTreeSet<&String> = self.enrolled.keys().chain(enrolled.keys()).collect();
        let of = |reports: &'a Enrolled, node: &String| reports.get(node).unwrap_or(&NONE);
        let differ = |node: &&String| !Arc::ptr_eq(of(&self.enrolled, node), of(enrolled, node));
        let uids = nodes
            .into_iter()
            .filter(differ)
            .flat_map(|node| of(&self.enrolled, node).symmetric_difference(of(enrolled, node)).map(String::as_str));
        uids.collect()
    }

    /// Whether nothing depends on an object but its own rows.
    fn stands_alone(&self, world: &World<'_>, key: &Key, loaded: &Loaded) -> bool {
        let (namespace, meta, entangled) = (&*key.namespace, &loaded.meta, &self.mesh.entangled);
        match &loaded.object {
            Object::Pod(pod) => {
                let named = entangled.named_ports.get(namespace).into_iter().flatten();
                meta.label(gateways::NAME).is_none()
                    && !pods::joins_alone(world, namespace, meta)
                    && !named.into_iter().any(|labels| meta.has_labels(labels))
                    && !entangled.endpoints.contains(&pods::uid(world, key))
                    && !pod.ips.iter().any(|ip| entangled.addresses.contains(&ip.to_canonical()))
            }
            // Endpoints of a service with a selector are its pods.
            Object::EndpointSlice(_) => meta
                .label("kubernetes.io/service-name")
                .and_then(|name| world.service(namespace, name))
                .is_some_and(|service| !service.object.spec.selector.is_empty()),
            _ => false,
        }
    }
}

fn pod<'a>(world: &World<'_>, key: &'a Key, loaded: &'a Loaded) -> Option<Entry<'a, core::Pod>> {
    match &loaded.object {
        Object::Pod(object) if world.discovered(key, &loaded.meta) => Some(Entry { key, meta: &loaded.meta, object }),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
