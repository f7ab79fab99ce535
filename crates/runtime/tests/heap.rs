//! Memory that an idle thread has freed goes back to the system.

use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const BLOCKS: usize = 1500;
const BLOCK: usize = 64 * 1024;

fn anonymous() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().strip_suffix(" kB").and_then(|n| n.parse::<u64>().ok()).expect("a number") * 1024
}

#[test]
fn what_an_idle_thread_has_freed_is_given_back() {
    ambit_runtime::heap::purge_in_background();
    let (parked, park) = std::sync::mpsc::channel::<()>();
    let (freed, has_freed) = std::sync::mpsc::channel();
    let worker = std::thread::spawn(move || {
        let held: Vec<Vec<u8>> = (0..BLOCKS).map(|n| vec![n as u8 | 1; BLOCK]).collect();
        let most = anonymous();
        drop(held);
        freed.send(most).expect("the test waits");
        // From now on this thread allocates nothing.
        let _ = park.recv();
    });
    let most = has_freed.recv().expect("a number");
    let start = Instant::now();
    while anonymous() > most - (BLOCKS * BLOCK) as u64 * 9 / 10 {
        assert!(start.elapsed() < Duration::from_secs(40), "{} of {most} are still held", anonymous());
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(parked);
    worker.join().expect("the worker");
}
