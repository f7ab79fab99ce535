//! The routes of one service, compiled, and finding the rule of a request.
//!
//! Owns precedence (Gateway API, `HTTPRouteRule.matches`): exact path, then expressions, then the longest prefix; then
//! method, number of headers, number of query parameters; then the older route and the earlier rule. A client's own
//! namespace comes before everything: where it has consumer routes, only these apply to it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use http::{HeaderMap, Method};
use regex::Regex;

use super::{PathMatch, RequestMatch, Route, RouteKind, RouteRule, ValueMatch};
use crate::Str;

/// So few rules are looked at one by one.
const FEW: usize = 8;
/// Compiled expressions are no larger than this, nor are their caches.
const REGEX_LIMIT: usize = 256 * 1024;

/// A request as routes see it.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    /// Method.
    pub method: &'a Method,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Query, without `?`; empty where there is none.
    pub query: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
}

/// Compiled routes.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    /// Rules for all clients.
    producers: Scope,
    /// Rules for the clients of a namespace.
    consumers: BTreeMap<Str, Scope>,
}

/// Rules by port; those without a port are in every one.
#[derive(Clone, Debug, Default)]
struct Scope {
    by_port: BTreeMap<u16, Rules>,
    other: Rules,
}

/// Rules in their order, and where to look among them: a request looks at those that its path and headers can match, however
/// many others there are.
#[derive(Clone, Debug, Default)]
struct Rules {
    entries: Vec<Entry>,
    exact: HashMap<Str, Bucket>,
    /// By prefix, without a slash at the end.
    prefixes: HashMap<Str, Bucket>,
    regexes: Vec<usize>,
}

/// Rules with the same path, by their first header with an exact value.
#[derive(Clone, Debug, Default)]
struct Bucket {
    all: Vec<usize>,
    by_header: Vec<(Str, HashMap<Str, Vec<usize>>)>,
    /// Those without such a header.
    rest: Vec<usize>,
}

#[derive(Clone, Debug)]
struct Entry {
    matcher: Arc<Matcher>,
    /// Which of its rule's matches that is.
    part: usize,
    chosen: Chosen,
}

/// The rule that a request follows.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// `namespace/name` of its route.
    pub route: Str,
    /// Kind, route and rule in words, for the log.
    pub name: Str,
    /// Kind of the route.
    pub kind: RouteKind,
    /// Its index in the route.
    pub index: usize,
    /// Its index among the rules of all routes of the table.
    pub order: usize,
    /// Itself.
    pub rule: Arc<RouteRule>,
    /// The prefix by which it was found, for rewrites.
    pub prefix: Option<Str>,
}

/// What was found for a request.
#[derive(Clone, Debug)]
pub enum Found<'a> {
    /// No route is attached: the service itself.
    Default,
    /// A rule.
    Rule(&'a Chosen),
    /// Routes are attached and none of their rules matches; whether the routes are for gRPC.
    None(RouteKind),
}

/// An expression that cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{expression:?} is not a regular expression that can be used: {reason}")]
pub struct BadExpression {
    /// The expression.
    pub expression: String,
    /// What is wrong with it.
    pub reason: String,
}

#[derive(Clone, Debug)]
struct Matcher {
    path: Path,
    method: Option<Str>,
    headers: Vec<ValueTest>,
    query: Vec<ValueTest>,
}

#[derive(Clone, Debug)]
enum Path {
    Exact(Str),
    Regex(Regex),
    /// Without a slash at the end.
    Prefix(Str),
}

/// Tests of headers, compiled; all must hold.
#[derive(Clone, Debug, Default)]
pub struct HeaderTests(Vec<ValueTest>);

impl HeaderTests {
    /// Compiles them.
    pub fn new(all: &[ValueMatch]) -> Result<Self, BadExpression> {
        all.iter().map(ValueTest::new).collect::<Result<_, _>>().map(Self)
    }

    /// Whether all hold.
    pub fn match_all(&self, headers: &HeaderMap) -> bool {
        self.0.iter().all(|t| t.matches_header(headers))
    }
}

#[derive(Clone, Debug)]
struct ValueTest {
    name: Str,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Exact(Str),
    Regex(Regex),
}

/// Compiles an expression that is to match as a whole. Matching takes time linear in the text, whatever the expression.
pub fn whole(expression: &str) -> Result<Regex, BadExpression> {
    let build = regex::RegexBuilder::new(&format!("^(?:{expression})$"))
        .size_limit(REGEX_LIMIT)
        .dfa_size_limit(REGEX_LIMIT)
        .build();
    build.map_err(|e| {
        let reason = e.to_string().lines().last().unwrap_or_default().to_owned();
        BadExpression { expression: expression.to_owned(), reason }
    })
}

impl RouteTable {
    /// Compiles routes, which come with the winner of a tie first.
    pub fn new(routes: &[Route]) -> Result<Self, BadExpression> {
        Self::default().next(routes)
    }

    /// The table of other routes; what both have in common is not compiled again.
    pub fn next(&self, routes: &[Route]) -> Result<Self, BadExpression> {
        let before = self.matchers();
        let mut table = Self::default();
        let mut order = 0;
        for route in routes {
            let scope = match &route.consumers {
                None => &mut table.producers,
                Some(namespace) => table.consumers.entry(namespace.clone()).or_default(),
            };
            let rules = match route.port {
                None => &mut scope.other,
                Some(port) => scope.by_port.entry(port).or_default(),
            };
            let entries = &mut rules.entries;
            for (index, rule) in route.rules.iter().enumerate() {
                let named = rule.name.as_deref().map(|n| format!(" ({n})")).unwrap_or_default();
                let name: Str = format!("{:?} {} rule {index}{named}", route.kind, route.name).into();
                for (n, one) in rule.matches.iter().enumerate() {
                    let matcher = match before.get(&(Arc::as_ptr(rule), n)) {
                        Some(known) => known.clone(),
                        None => Arc::new(Matcher::new(one)?),
                    };
                    let prefix = match &matcher.path {
                        Path::Prefix(prefix) => Some(prefix.clone()),
                        Path::Exact(_) | Path::Regex(_) => None,
                    };
                    let (route, kind, rule, name) = (route.name.clone(), route.kind, rule.clone(), name.clone());
                    let chosen = Chosen { route, name, kind, index, order, rule, prefix };
                    entries.push(Entry { matcher, part: n, chosen });
                }
                order += 1;
            }
        }
        for scope in std::iter::once(&mut table.producers).chain(table.consumers.values_mut()) {
            scope.finish();
        }
        Ok(table)
    }

    /// What was compiled of each match of a rule, by the rule's address, where compiling is dear. The table keeps its rules, so no
    /// other one has that address.
    fn matchers(&self) -> HashMap<(*const RouteRule, usize), Arc<Matcher>> {
        let scopes = std::iter::once(&self.producers).chain(self.consumers.values());
        let entries = scopes.flat_map(|s| s.by_port.values().chain([&s.other])).flat_map(|r| &r.entries);
        let dear = entries.filter(|e| e.matcher.has_expressions());
        dear.map(|e| ((Arc::as_ptr(&e.chosen.rule), e.part), e.matcher.clone())).collect()
    }

    /// The rule of a request that came to `port` from a client of `namespace`.
    pub fn find(&self, request: &RequestView<'_>, port: u16, namespace: Option<&str>) -> Found<'_> {
        let rules = self.rules(port, namespace);
        let Some(first) = rules.entries.first() else { return Found::Default };
        match rules.find(request) {
            Some(entry) => Found::Rule(&entry.chosen),
            None => Found::None(first.chosen.kind),
        }
    }

    fn rules(&self, port: u16, namespace: Option<&str>) -> &Rules {
        let own = namespace.and_then(|n| self.consumers.get(n)).map(|s| s.at(port));
        own.filter(|rules| !rules.entries.is_empty()).unwrap_or_else(|| self.producers.at(port))
    }

    /// Every rule that matches, the one that is taken first; for explaining.
    pub fn candidates<'a>(
        &'a self,
        request: &'a RequestView<'a>,
        port: u16,
        namespace: Option<&str>,
    ) -> impl Iterator<Item = (&'a Chosen, bool)> {
        self.rules(port, namespace).entries.iter().map(|e| (&e.chosen, e.matcher.matches(request)))
    }
}

impl Scope {
    fn at(&self, port: u16) -> &Rules {
        self.by_port.get(&port).unwrap_or(&self.other)
    }

    fn finish(&mut self) {
        for rules in self.by_port.values_mut() {
            rules.entries.extend(self.other.entries.iter().cloned());
            rules.finish();
        }
        self.other.finish();
    }
}

impl Rules {
    /// Sorts, and makes the index; the sort is stable, so that ties stay as the routes came.
    fn finish(&mut self) {
        self.entries.sort_by_key(|e| std::cmp::Reverse(e.matcher.rank()));
        for (n, entry) in self.entries.iter().enumerate() {
            match &entry.matcher.path {
                Path::Exact(path) => self.exact.entry(path.clone()).or_default().add(n, &entry.matcher),
                Path::Prefix(prefix) => self.prefixes.entry(prefix.clone()).or_default().add(n, &entry.matcher),
                Path::Regex(_) => self.regexes.push(n),
            }
        }
    }

    /// The first entry that matches. Exact paths rank before expressions, these before prefixes, and longer prefixes before
    /// shorter ones, so each bucket is looked at in the order of the entries.
    fn find(&self, request: &RequestView<'_>) -> Option<&Entry> {
        let in_bucket = |bucket: &Bucket| bucket.find(&self.entries, request);
        let exact = self.exact.get(request.path).and_then(in_bucket);
        let regex = || self.regexes.iter().map(|n| &self.entries[*n]).find(|e| e.matcher.matches(request));
        exact.or_else(regex).or_else(|| {
            let mut end = request.path.len();
            loop {
                if let Some(found) = self.prefixes.get(&request.path[..end]).and_then(in_bucket) {
                    return Some(found);
                }
                // Whole segments: before the last slash; the last prefix is the empty one.
                end = request.path[..end].rfind('/')?;
            }
        })
    }
}

impl Bucket {
    fn add(&mut self, n: usize, matcher: &Matcher) {
        self.all.push(n);
        let exact = matcher.headers.iter().find_map(|t| match &t.test {
            Test::Exact(value) => Some((&t.name, value)),
            Test::Regex(_) => None,
        });
        let Some((name, value)) = exact else { return self.rest.push(n) };
        let at = self.by_header.iter().position(|(of, _)| of == name).unwrap_or_else(|| {
            self.by_header.push((name.clone(), HashMap::new()));
            self.by_header.len() - 1
        });
        self.by_header[at].1.entry(value.clone()).or_default().push(n);
    }

    fn find<'a>(&self, entries: &'a [Entry], request: &RequestView<'_>) -> Option<&'a Entry> {
        let first = |list: &[usize], before: usize| {
            let mut list = list.iter().copied().take_while(|n| *n < before);
            list.find(|n| entries[*n].matcher.matches(request))
        };
        // A header that comes several times has a value that is in no index.
        let single = |name: &Str| {
            let mut values = request.headers.get_all(&**name).iter();
            (values.next(), values.next().is_none())
        };
        if self.all.len() < FEW || self.by_header.iter().any(|(name, _)| !single(name).1) {
            return first(&self.all, usize::MAX).map(|n| &entries[n]);
        }
        let mut best = first(&self.rest, usize::MAX);
        for (name, by_value) in &self.by_header {
            let value = single(name).0.and_then(|v| v.to_str().ok());
            let Some(list) = value.and_then(|v| by_value.get(v)) else { continue };
            best = first(list, best.unwrap_or(usize::MAX)).or(best);
        }
        best.map(|n| &entries[n])
    }
}

impl Matcher {
    fn new(m: &RequestMatch) -> Result<Self, BadExpression> {
        let path = match &m.path {
            None => Path::Prefix("".into()),
            Some(PathMatch::Exact(path)) => Path::Exact(path.clone()),
            Some(PathMatch::Prefix(path)) => Path::Prefix(path.trim_end_matches('/').into()),
            Some(PathMatch::Regex(expression)) => Path::Regex(whole(expression)?),
        };
        let tests = |all: &[ValueMatch]| all.iter().map(ValueTest::new).collect::<Result<Vec<_>, _>>();
        Ok(Self { path, method: m.method.clone(), headers: tests(&m.headers)?, query: tests(&m.query)? })
    }

    fn has_expressions(&self) -> bool {
        let any = |all: &[ValueTest]| all.iter().any(|t| matches!(t.test, Test::Regex(_)));
        matches!(self.path, Path::Regex(_)) || any(&self.headers) || any(&self.query)
    }

    fn rank(&self) -> (u8, usize, bool, usize, usize) {
        let (kind, length) = match &self.path {
            Path::Exact(path) => (2, path.len()),
            Path::Regex(expression) => (1, expression.as_str().len()),
            Path::Prefix(path) => (0, path.len()),
        };
        (kind, length, self.method.is_some(), self.headers.len(), self.query.len())
    }

    fn matches(&self, r: &RequestView<'_>) -> bool {
        let path = match &self.path {
            Path::Exact(path) => r.path == &**path,
            Path::Regex(expression) => expression.is_match(r.path),
            Path::Prefix(prefix) => {
                let rest = r.path.strip_prefix(&**prefix);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        };
        path && self.method.as_ref().is_none_or(|m| r.method.as_str() == &**m)
            && self.headers.iter().all(|t| t.matches_header(r.headers))
            && self.query.iter().all(|t| t.matches_query(r.query))
    }
}

impl ValueTest {
    fn new(m: &ValueMatch) -> Result<Self, BadExpression> {
        let test = if m.regex { Test::Regex(whole(&m.value)?) } else { Test::Exact(m.value.clone()) };
        Ok(Self { name: m.name.clone(), test })
    }

    fn fits(&self, value: &str) -> bool {
        match &self.test {
            Test::Exact(wanted) => value == &**wanted,
            Test::Regex(expression) => expression.is_match(value),
        }
    }

    fn matches_header(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&*self.name).iter();
        let Some(first) = values.next() else { return false };
        match (first.to_str(), values.next()) {
            (Ok(one), None) => self.fits(one),
            // Several values are one, with commas between (RFC 9110 section 5.3).
            (Ok(_), Some(_)) => {
                let all: Option<Vec<&str>> = headers.get_all(&*self.name).iter().map(|v| v.to_str().ok()).collect();
                all.is_some_and(|all| self.fits(&all.join(",")))
            }
            (Err(_), _) => false,
        }
    }

    /// The first value of a parameter counts (Gateway API, `HTTPQueryParamMatch`).
    fn matches_query(&self, query: &str) -> bool {
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        pairs.find(|(name, _)| *name == *self.name).is_some_and(|(_, value)| self.fits(&value))
    }
}
