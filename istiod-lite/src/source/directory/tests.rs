use super::*;
use crate::objects::Object;

struct Dirs {
    base: PathBuf,
    source: Directory,
}

impl Dirs {
    fn new(name: &str) -> Self {
        let base = std::env::temp_dir().join(format!("ambit-dir-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(base.join("user")).expect("create");
        let source = Directory::new(base.join("user"), base.join("overlay"));
        Self { base, source }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.base.join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("create");
        // As editors do: a new file, then a rename over the old one.
        let temporary = path.with_extension("tmp~");
        fs::write(&temporary, text).expect("write");
        fs::rename(&temporary, &path).expect("rename");
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.base.join(path)).expect("remove");
    }

    fn scan(&mut self) -> (Vec<String>, Vec<String>) {
        let state = self.source.scan();
        let problems = state.problems.values().map(|p| format!("{} {} kept={}", p.place, p.reason, p.kept));
        (state.objects.keys().map(ToString::to_string).collect(), problems.collect())
    }
}

impl Drop for Dirs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n")
}

#[test]
fn files_documents_deletes_and_renames() {
    let mut dirs = Dirs::new("layout");
    dirs.write("user/a.yaml", &[namespace("one"), namespace("two")].join("---\n"));
    dirs.write("user/deep/down/b.yml", &namespace("three"));
    dirs.write("user/.hidden.yaml", &namespace("hidden"));
    dirs.write("user/notes.txt", "not yaml: [");
    let (objects, problems) = dirs.scan();
    assert_eq!(objects, ["Namespace one", "Namespace three", "Namespace two"]);
    assert!(problems.is_empty(), "{problems:?}");
    fs::rename(dirs.base.join("user/deep/down/b.yml"), dirs.base.join("user/c.yaml")).expect("rename");
    dirs.write("user/a.yaml", &namespace("one"));
    assert_eq!(dirs.scan().0, ["Namespace one", "Namespace three"]);
    dirs.remove("user/c.yaml");
    assert_eq!(dirs.scan().0, ["Namespace one"]);
}

#[test]
fn a_broken_document_keeps_its_object_and_harms_no_other() {
    let mut dirs = Dirs::new("broken");
    dirs.write("user/a.yaml", &[namespace("one"), namespace("two")].join("---\n"));
    dirs.scan();
    dirs.write("user/a.yaml", &format!("{}---\nkind: [broken\n---\n{}", namespace("one"), namespace("three")));
    let (objects, problems) = dirs.scan();
    assert_eq!(objects, ["Namespace one", "Namespace three", "Namespace two"], "two stays: its file is broken");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("a.yaml:7 ") || problems[0].starts_with("a.yaml:6 "), "{problems:?}");
    dirs.write("user/a.yaml", &namespace("one"));
    assert_eq!(dirs.scan(), (vec!["Namespace one".to_owned()], vec![]));
}

#[test]
fn a_rule_that_is_to_ask_for_tls_and_is_broken_does_not_stay_as_it_was() {
    let broken = |dirs: &mut Dirs, policy: &str| {
        dirs.write(
            "user/d.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: d, namespace: ns}}\n\
                 spec: {{host: a.example, trafficPolicy: {policy}}}\n"
            ),
        );
        let state = dirs.source.scan();
        state.objects.values().map(|o| o.object.is_broken()).collect::<Vec<_>>()
    };
    let mut dir = Dirs::new("tls");
    assert_eq!(broken(&mut dir, "{connectionPool: {tcp: {maxConnections: 5}}}"), [false]);
    assert_eq!(broken(&mut dir, "{connectionPoool: {}}"), [false], "the last good state stays");
    assert_eq!(broken(&mut dir, "{tls: {mode: SIMPLE, snni: x}}"), [true], "closed");
    assert_eq!(broken(&mut dir, "{tls: {mode: SIMPLE, sni: x}}"), [false]);
    assert_eq!(broken(&mut dir, "{tls: {mode: SIMPLE, snni: x}}"), [false], "the last good state has TLS");
}

#[test]
fn wrong_types_unknown_fields_and_kinds_are_told_with_their_place() {
    let mut dirs = Dirs::new("wrong");
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\nspec:\n";
    for (text, expected) in [
        ("apiVersion: v1\nkind: Service\nmetadata:\n  name: s\nspec:\n  ports:\n  - port: eighty\n", "f.yaml:7 "),
        (&*format!("{policy}  acton: DENY\n"), "f.yaml:6 spec.acton: unknown field"),
        (&*format!("{policy}  action: MAYBE\n"), "unknown variant `MAYBE`, expected one of"),
        (
            &*format!(
                "{policy}  rules:\n  - from:\n    - source:\n        ipBlocks:\n        - 10.0.0.0/8\n        - 10.0.0.0/99\n"
            ),
            "f.yaml:11 spec.rules[0].from[0].source.ipBlocks[1]: \"10.0.0.0/99\": expected an IP address or CIDR",
        ),
        (
            &*format!("{policy}  rules:\n  - to:\n    - operation:\n        ports: [\"70000\"]\n"),
            "spec.rules[0].to[0].operation.ports[0]: \"70000\": expected a port",
        ),
        (
            &*format!("{policy}  rules:\n  - from:\n    - source:\n        principals: [\"a*b\"]\n"),
            "principals[0]: \"a*b\": expected a name",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  conatiners: []\n", "f.yaml:6 spec.conatiners"),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  lables: {}\n", "f.yaml:5 metadata.lables"),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: Not_A_Name\n", "metadata.name: \"Not_A_Name\": expected"),
        ("apiVersion: v1\nmetadata:\n  name: p\n", "apiVersion and kind must be given"),
        ("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: v\n", "use an HTTPRoute"),
        ("a: &a [x,x]\nb: &b [*a,*a]\n? {\n", "f.yaml:"),
        ("just text\n", "f.yaml:1 "),
    ] {
        dirs.write("user/f.yaml", text);
        let (_, problems) = dirs.scan();
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        assert!(problems[0].contains(expected), "expected {expected:?} in {}", problems[0]);
    }
    dirs.remove("user/f.yaml");
    dirs.scan();
    fs::write(dirs.base.join("user/f.yaml"), [0xff, 0xfe, 0x00]).expect("write");
    assert!(dirs.scan().1[0].contains("is not UTF-8"));
}

#[test]
fn duplicates_name_the_first() {
    let mut dirs = Dirs::new("twice");
    dirs.write("user/a.yaml", &namespace("one"));
    dirs.write("user/b.yaml", &namespace("one"));
    let (objects, problems) = dirs.scan();
    assert_eq!(objects, ["Namespace one"]);
    assert_eq!(problems, ["b.yaml:1 Namespace one is given twice; the first is at a.yaml:1 kept=true"]);
}

#[test]
fn a_directory_that_vanishes_takes_nothing_with_it() {
    let mut dirs = Dirs::new("vanish");
    dirs.write("user/a.yaml", &namespace("one"));
    dirs.scan();
    fs::rename(dirs.base.join("user"), dirs.base.join("away")).expect("rename");
    let (objects, problems) = dirs.scan();
    assert_eq!(objects, ["Namespace one"]);
    assert!(problems[0].contains("expected a directory"), "{problems:?}");
    fs::rename(dirs.base.join("away"), dirs.base.join("user")).expect("rename");
    dirs.remove("user/a.yaml");
    assert_eq!(dirs.scan(), (vec![], vec![]));
}

#[test]
fn the_overlay_adds_objects_and_patches() {
    let mut dirs = Dirs::new("overlay");
    let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  serviceAccountName: web\n";
    dirs.write("user/p.yaml", pod);
    dirs.write("overlay/objects/q.yaml", &pod.replace("name: p", "name: q"));
    let patch = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  uid: u1\nspec:\n  nodeName: n1\nstatus:\n  podIP: 10.0.0.1\n";
    dirs.write("overlay/patches/p.yaml", patch);
    dirs.write("overlay/patches/gone.yaml", &patch.replace("name: p", "name: gone"));
    let state = dirs.source.scan();
    assert!(state.problems.is_empty(), "{:?}", state.problems);
    let names: Vec<String> = state.objects.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["Pod default/p", "Pod default/q"]);
    let loaded = state.objects.values().next().expect("p");
    let Object::Pod(pod) = &loaded.object else { panic!("not a pod") };
    assert_eq!((&*pod.node_name, &*pod.service_account), ("n1", "web"));
    assert_eq!((&*pod.ips, &*loaded.meta.uid), (&["10.0.0.1".parse().expect("an address")][..], "u1"));
}

#[test]
fn an_unsupported_kind_does_not_keep_its_neighbours() {
    let mut dirs = Dirs::new("unsupported");
    let role = "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata:\n  name: r\n";
    dirs.write("user/a.yaml", &[namespace("one"), namespace("two"), role.into()].join("---\n"));
    assert_eq!(dirs.scan().0, ["Namespace one", "Namespace two"]);
    dirs.write("user/a.yaml", &[namespace("one"), role.into()].join("---\n"));
    assert_eq!(dirs.scan().0, ["Namespace one"]);
    // But a mistake in the kind itself keeps the object that it was.
    dirs.write("user/a.yaml", &namespace("one").replace("Namespace", "Namespaec"));
    assert_eq!(dirs.scan().0, ["Namespace one"]);
}

#[test]
fn a_file_written_in_place_is_read_when_it_is_quiet() {
    let mut dirs = Dirs::new("inplace");
    dirs.write("user/a.yaml", &[namespace("one"), namespace("two")].join("---\n"));
    dirs.scan();
    fs::write(dirs.base.join("user/a.yaml"), namespace("one")).expect("write");
    assert_eq!(dirs.scan().0, ["Namespace one", "Namespace two"], "it may be half written");
    assert!(dirs.source.unsettled());
    let quiet = SystemTime::now() - Duration::from_secs(1);
    fs::File::options()
        .append(true)
        .open(dirs.base.join("user/a.yaml"))
        .and_then(|f| f.set_modified(quiet))
        .expect("age");
    assert_eq!(dirs.scan().0, ["Namespace one"]);
    assert!(!dirs.source.unsettled());
}

#[test]
fn a_broken_patch_keeps_the_object_whole() {
    let mut dirs = Dirs::new("patch");
    dirs.write("user/p.yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n");
    let patch = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nstatus:\n  podIP: 10.0.0.1\n";
    dirs.write("overlay/patches/p.yaml", patch);
    dirs.scan();
    dirs.write("overlay/patches/p.yaml", "kind: [");
    let state = dirs.source.scan();
    let Object::Pod(pod) = &state.objects.values().next().expect("p").object else { panic!("not a pod") };
    assert_eq!((&*pod.ips, state.problems.len()), (&["10.0.0.1".parse().expect("an address")][..], 1));
}

#[test]
fn ten_thousand_documents_in_a_file() {
    let mut dirs = Dirs::new("many");
    let all: Vec<String> = (0..10_000).map(|n| namespace(&format!("n{n}"))).collect();
    dirs.write("user/many.yaml", &all.join("---\n"));
    let (objects, problems) = dirs.scan();
    assert_eq!((objects.len(), problems.len()), (10_000, 0));
}

#[test]
fn a_file_of_fifty_megabytes() {
    const OBJECTS: usize = 5000;
    let mut dirs = Dirs::new("large");
    // What fills it is part of the objects; one of them is not valid.
    let text = "all work and no play ".repeat(500);
    let object = |n: usize| {
        let kind = if n == 4321 { "labels: [not, a, map]" } else { "labels: {istio.io/dataplane-mode: ambient}" };
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: n{n}\n  {kind}\n  annotations:\n    text: {text}\n"
        )
    };
    let all: Vec<String> = (0..OBJECTS).map(object).collect();
    let all = all.join("---\n");
    assert!(all.len() > 50 << 20, "{}", all.len());
    dirs.write("user/large.yaml", &all);
    let (objects, problems) = dirs.scan();
    assert_eq!((objects.len(), problems.len()), (OBJECTS - 1, 1));
    let line = 1 + 4321 * 8;
    assert!(problems[0].contains(&format!("large.yaml:{}", line + 4)), "{}", problems[0]);
}
