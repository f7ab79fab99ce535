use super::*;

const KIB: u32 = 1024;
const MIB: u32 = 1024 * KIB;

fn path(window: u32, limit: u32) -> Path {
    Path::new(&Settings { stream_window: window, max_stream_window: limit, ..Settings::default() })
}

/// A path that holds `rate` x `round_trip` bytes, always full, used by one stream: what its window settles at.
fn settle(rate: f64, round_trip: Duration, limit: u32) -> u32 {
    let mut path = path(256 * KIB, limit);
    let (mut now, mut window) = (Sample::default(), 256 * KIB);
    for _ in 0..2000 {
        // A window a round trip, unless the path is slower: then it queues, and the round trip grows.
        let took = round_trip.max(Duration::from_secs_f64(f64::from(window) / rate));
        let sent = now;
        now.at += took;
        now.received += u64::from(window);
        if path.wants_probe(now.received, || now.at) {
            path.answered(sent, now, u64::from(window));
            window = path.window(1);
        }
    }
    window
}

#[test]
fn windows_follow_the_path() {
    let limit = 16 * MIB;
    for (name, rate, round_trip, at_least, at_most) in [
        ("one machine, 1 GB/s, 50 us", 1e9, Duration::from_micros(50), 256 * KIB, 512 * KIB),
        ("one zone, 1 GB/s, 1 ms", 1e9, Duration::from_millis(1), MIB, 2 * MIB),
        ("a continent, 125 MB/s, 60 ms", 1.25e8, Duration::from_millis(60), 8 * MIB, limit),
        ("beyond the limit", 1e9, Duration::from_millis(200), limit, limit),
        ("a slow link", 1e6, Duration::from_millis(20), 256 * KIB, 512 * KIB),
    ] {
        let window = settle(rate, round_trip, limit);
        assert!((at_least..=at_most).contains(&window), "{name}: {} KiB", window / KIB);
    }
}

#[test]
fn many_streams_that_fill_the_path_together_are_not_limited_by_their_windows() {
    let mut path = path(256 * KIB, 16 * MIB);
    let mut now = Sample::default();
    for _ in 0..100 {
        let sent = now;
        now.at += Duration::from_millis(1);
        now.received += u64::from(4 * MIB);
        path.answered(sent, now, u64::from(4 * MIB / 50));
    }
    assert_eq!(path.window(50), 256 * KIB);
}

#[test]
fn an_interactive_tunnel_is_never_probed() {
    assert!(!path(256 * KIB, MIB).wants_probe(100 * 1024, || unreachable!("no clock is read for it")));
}

#[test]
fn probes_that_change_nothing_become_rare() {
    let mut path = path(256 * KIB, MIB);
    let (mut probes, mut now) = (0, Sample::default());
    for _ in 0..60_000 {
        // Plenty of data, a little a round trip: the window does not limit it.
        let sent = Sample { at: now.at, received: now.received + 190 * 1024 };
        now.received += 200 * 1024;
        if path.wants_probe(now.received, || now.at) {
            probes += 1;
            path.answered(sent, Sample { at: now.at + Duration::from_millis(1), ..now }, 10 * 1024);
            assert_eq!(path.window(1), 256 * KIB);
        }
        now.at += Duration::from_millis(1);
    }
    assert!((8..=20).contains(&probes), "{probes} in a minute");
}

#[test]
fn many_streams_share_the_budget() {
    let mut path = path(16 * MIB, 16 * MIB);
    let budget = Settings::default().connection_window;
    for streams in (0..=200).chain((0..200).rev()) {
        let window = path.window(streams);
        assert!(streams as u64 * u64::from(window) <= u64::from(budget), "{streams} with {window} each");
        // Never less than a quarter of what would be fair.
        let fair = (budget / streams.max(1) as u32).min(16 * MIB);
        assert!(window >= fair / 4, "{streams} with {} KiB each of {}", window / KIB, fair / KIB);
    }
    assert_eq!(path.window(1), 16 * MIB);
    assert_eq!(path.window(usize::MAX), LEAST_SHARE, "a peer that opens more than it may");
}

#[test]
fn a_number_of_streams_that_goes_up_and_down_does_not_move_the_window() {
    let mut path = path(16 * MIB, 16 * MIB);
    for around in [4, 8, 32, 64, 128] {
        path.window(around + 1);
        let windows: std::collections::BTreeSet<u32> = (0..10).map(|n| path.window(around + n % 2)).collect();
        assert_eq!(windows.len(), 1, "around {around}: {windows:?}");
    }
}
