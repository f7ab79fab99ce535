//! Tells of objects that have no effect here, such as a VirtualService: once for each kind.
//!
//! Owns the watches, of metadata only. Never reads what the objects say.

use std::time::Duration;

use futures::TryStreamExt;
use kube::api::{ApiResource, DynamicObject, PartialObjectMeta};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::objects::known::{UNREAD, Unread};

/// A kind that the cluster does not have, or that could not be watched, is looked for again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// The kind as the cluster serves it; `None` where it does not.
pub async fn served(client: &Client, unread: &Unread) -> Result<Option<ApiResource>, kube::Error> {
    let groups = client.list_api_groups().await?;
    if !groups.groups.iter().any(|g| g.name == unread.group) {
        return Ok(None);
    }
    let group = kube::discovery::oneshot::group(client, unread.group).await?;
    Ok(group.recommended_kind(unread.kind).map(|(resource, _)| resource))
}

/// Follows all such kinds, each until one object of it has been seen.
pub async fn run(client: Client) {
    let mut all = JoinSet::new();
    for unread in UNREAD {
        all.spawn(follow(client.clone(), unread));
    }
    while all.join_next().await.is_some() {}
}

async fn follow(client: Client, unread: &'static Unread) {
    loop {
        match served(&client, unread).await {
            Ok(Some(resource)) => {
                if let Some(object) = first(&client, &resource).await {
                    let Unread { kind, group, instead } = unread;
                    warn!(
                        kind,
                        group, object, instead, "objects of this kind have no effect; istiod-lite check lists them"
                    );
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => debug!(kind = unread.kind, %error, "discovery"),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Waits for an object of a kind; `None` where the watch fails.
async fn first(client: &Client, resource: &ApiResource) -> Option<String> {
    let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client.clone(), resource);
    let mut events = std::pin::pin!(watcher::watcher(api, watcher::Config::default()));
    loop {
        match events.try_next().await {
            Ok(Some(Event::InitApply(object) | Event::Apply(object))) => {
                return Some(format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any()));
            }
            Ok(Some(Event::Init | Event::InitDone | Event::Delete(_))) => {}
            Ok(None) => return None,
            Err(error) => {
                debug!(kind = resource.kind, %error, "watch");
                return None;
            }
        }
    }
}
