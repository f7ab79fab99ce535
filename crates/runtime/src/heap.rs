//! Heap profiles of this process, in the form that `go tool pprof` reads, and what the allocator counts.
//!
//! Owns the pages only; the allocator samples, and does so only in a process that was started for it, for its cost. It counts
//! always.

use tikv_jemalloc_ctl::{background_thread, stats_print};

use crate::http::{self, Page, StatusCode};

/// What has to be in the environment at the start.
const NEEDED: &str = "_RJEM_MALLOC_CONF=prof:true,prof_active:true,lg_prof_sample:19";

/// Lets the allocator give memory back by threads of its own. Without them what a thread has freed stays with the process
/// until that thread allocates again, and a worker that has nothing to do never does: the process would seem short of
/// memory for as long as it refuses work because of that.
pub fn purge_in_background() {
    if let Err(error) = background_thread::write(true) {
        tracing::warn!(%error, "freed memory is not given back in the background");
    }
}

/// The page `/debug/pprof/heap`: what is allocated now, by who allocated it.
pub async fn page() -> Page {
    let Some(control) = jemalloc_pprof::PROF_CTL.as_ref() else {
        let text = format!("heap profiles need a process that was started with {NEEDED} in its environment\n");
        return http::text(StatusCode::SERVICE_UNAVAILABLE, text);
    };
    let mut control = control.clone().lock_owned().await;
    // Writes and reads a temporary file: not on a thread that has other work.
    match tokio::task::spawn_blocking(move || control.dump_pprof().map_err(|e| e.to_string())).await {
        Ok(Ok(profile)) => http::bytes("application/octet-stream", profile),
        Ok(Err(error)) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// The page `/debug/allocator`: what the allocator has given out since the start, in its own words (JSON, see jemalloc's
/// manual).
pub fn statistics() -> Page {
    let mut options = stats_print::Options::default();
    options.json_format = true;
    options.skip_constants = true;
    options.skip_per_arena = true;
    options.skip_mutex_statistics = true;
    let mut text = Vec::new();
    match stats_print::stats_print(&mut text, options) {
        Ok(()) => http::bytes("application/json", text),
        Err(error) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_was_not_started_for_it_says_how() {
        let page = page().await;
        assert_eq!(page.status(), StatusCode::SERVICE_UNAVAILABLE);
        let body = http_body_util::BodyExt::collect(page.into_body()).await.expect("body").to_bytes();
        assert!(String::from_utf8_lossy(&body).contains("prof:true"), "{body:?}");
    }
}
