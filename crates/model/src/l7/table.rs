//! The routes of one service, compiled, and finding the rule of a request.
//!
//! Owns precedence (Gateway API, `HTTPRouteRule.matches`): exact path, then expressions, then the longest prefix; then
//! method, number of headers, number of query parameters; then the older route and the earlier rule. A client's own
//! namespace comes before everything: where it has consumer routes, only these apply to it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use http::{HeaderMap, Method};
use regex::Regex;

use super::re2;
use super::{PathMatch, RequestMatch, Route, RouteKind, RouteRule, ValueMatch};
use crate::Str;

/// So few rules are looked at one by one.
const FEW: usize = 8;
/// A compiled expression is no larger than this; bytes.
const REGEX_LIMIT: usize = 4 << 20;
/// Nor is the cache of one that is used; bytes.
const REGEX_CACHE: usize = 64 << 10;

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
    /// Those with the same path, which is no expression, are side by side.
    entries: Vec<Entry>,
    exact: HashMap<Str, Span>,
    /// By prefix, without a slash at the end.
    prefixes: HashMap<Str, Span>,
    regexes: Span,
    /// Of spans that are not short, by their first entry.
    by_header: HashMap<u32, ByHeader>,
}

/// Entries from one on, up to another.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    from: u32,
    to: u32,
}

/// Rules with the same path, by their first header with an exact value.
#[derive(Clone, Debug, Default)]
struct ByHeader {
    named: Vec<(Str, HashMap<Str, Vec<u32>>)>,
    /// Those without such a header.
    rest: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Entry {
    chosen: Chosen,
    /// What of its match was compiled, where it has expressions.
    compiled: Option<Arc<Compiled>>,
}

/// The rule that a request follows. There are many of them, and most are never followed: small.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Its route.
    pub route: Arc<RouteName>,
    /// Itself.
    pub rule: Arc<RouteRule>,
    /// Its index in the route.
    pub index: u32,
    /// Its index among the rules of all routes of the table.
    pub order: u32,
    /// Which of its matches that is.
    pub part: u32,
    /// Made when it is asked for.
    name: OnceLock<Str>,
}

/// A route as its rules know it.
#[derive(Clone, Debug)]
pub struct RouteName {
    /// `namespace/name`.
    pub name: Str,
    /// Its kind.
    pub kind: RouteKind,
}

impl Chosen {
    /// Kind, route and rule in words, for the log.
    pub fn name(&self) -> &Str {
        self.name.get_or_init(|| {
            let named = self.rule.name.as_deref().map(|n| format!(" ({n})")).unwrap_or_default();
            format!("{:?} {} rule {}{named}", self.route.kind, self.route.name, self.index).into()
        })
    }

    fn matched(&self) -> &RequestMatch {
        // Entries are made of the matches that their rules have.
        &self.rule.matches[self.part as usize]
    }
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
pub enum BadExpression {
    /// It is none.
    #[error("{0:?} is not a regular expression (RE2 syntax): {1}")]
    Syntax(String, String),
    /// It is one, and takes too much memory.
    #[error("{0:?} takes more than {REGEX_LIMIT} bytes of memory when it is compiled")]
    TooLarge(String),
}

impl BadExpression {
    /// What was expected in its place.
    pub fn expected(&self) -> &'static str {
        match self {
            Self::Syntax(..) => "a regular expression (RE2 syntax)",
            Self::TooLarge(_) => "a regular expression that takes at most 4 MiB of memory when it is compiled",
        }
    }
}

/// The expressions of one match, each where it has one.
#[derive(Debug)]
struct Compiled {
    path: Option<Regex>,
    headers: Vec<Option<Regex>>,
    query: Vec<Option<Regex>>,
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
        self.0.iter().all(|t| t.tested.matches_header(t.compiled.as_ref(), headers))
    }
}

#[derive(Clone, Debug)]
struct ValueTest {
    tested: ValueMatch,
    compiled: Option<Regex>,
}

/// Compiles an expression that is to match as a whole. Matching takes time linear in the text, whatever the expression.
pub fn whole(expression: &str) -> Result<Regex, BadExpression> {
    within(expression, REGEX_LIMIT)
}

fn within(expression: &str, limit: usize) -> Result<Regex, BadExpression> {
    let build = regex::RegexBuilder::new(&format!("^(?:{})$", re2::translate(expression)))
        .size_limit(limit)
        .dfa_size_limit(REGEX_CACHE)
        .build();
    build.map_err(|e| match e {
        regex::Error::CompiledTooBig(_) => BadExpression::TooLarge(expression.to_owned()),
        e => {
            let reason = e.to_string().lines().last().unwrap_or_default().to_owned();
            BadExpression::Syntax(expression.to_owned(), reason)
        }
    })
}

/// Bytes that an expression may take when it is compiled and used, at most; right within a factor of four.
pub fn cost(expression: &str) -> Result<usize, BadExpression> {
    const STEPS: [usize; 5] = [16 << 10, 64 << 10, 256 << 10, 1 << 20, REGEX_LIMIT];
    let mut last = Ok(0);
    for limit in STEPS {
        last = within(expression, limit).map(|_| limit + REGEX_CACHE / 4);
        if !matches!(last, Err(BadExpression::TooLarge(_))) {
            break;
        }
    }
    last
}

impl RouteTable {
    /// Compiles routes, which come with the winner of a tie first.
    pub fn new(routes: &[Route]) -> Result<Self, BadExpression> {
        Self::default().next(routes)
    }

    /// The table of other routes; what both have in common is not compiled again.
    pub fn next(&self, routes: &[Route]) -> Result<Self, BadExpression> {
        let before = self.compiled();
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
            let of = Arc::new(RouteName { name: route.name.clone(), kind: route.kind });
            for (index, rule) in (0..).zip(&route.rules) {
                for (part, one) in (0..).zip(&rule.matches) {
                    let compiled = match before.get(&(Arc::as_ptr(rule), part)) {
                        Some(known) => Some(known.clone()),
                        None => Compiled::new(one)?.map(Arc::new),
                    };
                    let (route, rule, name) = (of.clone(), rule.clone(), OnceLock::new());
                    rules.entries.push(Entry { chosen: Chosen { route, rule, index, order, part, name }, compiled });
                }
                order += 1;
            }
        }
        for scope in std::iter::once(&mut table.producers).chain(table.consumers.values_mut()) {
            scope.finish();
        }
        Ok(table)
    }

    /// What was compiled of each match of a rule, by the rule's address. The table keeps its rules, so no other one has that
    /// address.
    fn compiled(&self) -> HashMap<(*const RouteRule, u32), Arc<Compiled>> {
        let scopes = std::iter::once(&self.producers).chain(self.consumers.values());
        let entries = scopes.flat_map(|s| s.by_port.values().chain([&s.other])).flat_map(|r| &r.entries);
        let key = |e: &Entry| (Arc::as_ptr(&e.chosen.rule), e.chosen.part);
        entries.filter_map(|e| Some((key(e), e.compiled.clone()?))).collect()
    }

    /// The rule of a request that came to `port` from a client of `namespace`.
    pub fn find(&self, request: &RequestView<'_>, port: u16, namespace: Option<&str>) -> Found<'_> {
        let rules = self.rules(port, namespace);
        let Some(first) = rules.entries.first() else { return Found::Default };
        match rules.find(request) {
            Some(entry) => Found::Rule(&entry.chosen),
            None => Found::None(first.chosen.route.kind),
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
        self.rules(port, namespace).entries.iter().map(|e| (&e.chosen, e.matches(request)))
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
        self.entries.shrink_to_fit();
        self.entries.sort_by(|a, b| a.rank().cmp(&b.rank()));
        let mut from = 0;
        for group in self.entries.chunk_by(|a, b| a.path() == b.path()) {
            // As many rules as fit into memory are fewer.
            let span = Span { from, to: from + u32::try_from(group.len()).unwrap_or(u32::MAX) };
            from = span.to;
            match group[0].path() {
                // A path with a slash at its end is the only one that is another text than the rule's.
                Path::Exact(path) => drop(self.exact.insert(path.clone(), span)),
                Path::Prefix(path) => drop(self.prefixes.insert(group[0].prefix_key(path), span)),
                Path::Regex => self.regexes = span,
            }
            if group.len() >= FEW && !matches!(group[0].path(), Path::Regex) {
                self.by_header.insert(span.from, ByHeader::new(span.from, group));
            }
        }
        self.exact.shrink_to_fit();
        self.prefixes.shrink_to_fit();
    }

    fn of(&self, span: Span) -> &[Entry] {
        &self.entries[span.from as usize..span.to as usize]
    }

    /// The first entry that matches. Exact paths rank before expressions, these before prefixes, and longer prefixes before
    /// shorter ones, so each span is looked at in the order of the entries.
    fn find(&self, request: &RequestView<'_>) -> Option<&Entry> {
        let within = |span: &Span| match self.by_header.get(&span.from) {
            Some(index) => index.find(self, *span, request),
            None => self.of(*span).iter().find(|e| e.matches(request)),
        };
        let exact = self.exact.get(request.path).and_then(within);
        let regex = || self.of(self.regexes).iter().find(|e| e.matches(request));
        exact.or_else(regex).or_else(|| {
            let mut end = request.path.len();
            loop {
                if let Some(found) = self.prefixes.get(&request.path[..end]).and_then(within) {
                    return Some(found);
                }
                // Whole segments: before the last slash; the last prefix is the empty one.
                end = request.path[..end].rfind('/')?;
            }
        })
    }
}

impl ByHeader {
    fn new(from: u32, group: &[Entry]) -> Self {
        let mut index = Self::default();
        for (n, entry) in (from..).zip(group) {
            let Some(exact) = entry.chosen.matched().headers.iter().find(|t| !t.regex) else {
                index.rest.push(n);
                continue;
            };
            let at = index.named.iter().position(|(of, _)| *of == exact.name).unwrap_or_else(|| {
                index.named.push((exact.name.clone(), HashMap::new()));
                index.named.len() - 1
            });
            index.named[at].1.entry(exact.value.clone()).or_default().push(n);
        }
        index
    }

    fn find<'a>(&self, rules: &'a Rules, span: Span, request: &RequestView<'_>) -> Option<&'a Entry> {
        let first = |list: &[u32], before: u32| {
            let mut list = list.iter().copied().take_while(|n| *n < before);
            list.find(|n| rules.entries[*n as usize].matches(request))
        };
        // A header that comes several times has a value that is in no index.
        let single = |name: &Str| {
            let mut values = request.headers.get_all(&**name).iter();
            (values.next(), values.next().is_none())
        };
        if self.named.iter().any(|(name, _)| !single(name).1) {
            return rules.of(span).iter().find(|e| e.matches(request));
        }
        let mut best = first(&self.rest, u32::MAX);
        for (name, by_value) in &self.named {
            let value = single(name).0.and_then(|v| v.to_str().ok());
            let Some(list) = value.and_then(|v| by_value.get(v)) else { continue };
            best = first(list, best.unwrap_or(u32::MAX)).or(best);
        }
        best.map(|n| &rules.entries[n as usize])
    }
}

impl Compiled {
    fn new(of: &RequestMatch) -> Result<Option<Self>, BadExpression> {
        let value = |m: &ValueMatch| m.regex.then(|| whole(&m.value)).transpose();
        let values = |all: &[ValueMatch]| all.iter().map(value).collect::<Result<Vec<_>, _>>();
        let path = match &of.path {
            Some(PathMatch::Regex(expression)) => Some(whole(expression)?),
            None | Some(PathMatch::Exact(_) | PathMatch::Prefix(_)) => None,
        };
        let compiled = Self { path, headers: values(&of.headers)?, query: values(&of.query)? };
        let any = compiled.path.is_some() || compiled.headers.iter().chain(&compiled.query).any(Option::is_some);
        Ok(any.then_some(compiled))
    }
}

/// What the path of an entry is compared with.
#[derive(PartialEq)]
enum Path<'a> {
    Exact(&'a Str),
    /// All expressions are looked at, one after the other.
    Regex,
    /// Without a slash at the end.
    Prefix(&'a str),
}

/// Kind and length of the path, the path itself, and what else is asked for.
type Rank<'a> = (Reverse<(u8, usize)>, &'a str, Reverse<(bool, usize, usize)>);

/// A prefix as it is compared: of whole segments, without a slash at the end.
pub fn prefix(path: Option<&PathMatch>) -> Option<&str> {
    match path {
        None => Some(""),
        Some(PathMatch::Prefix(path)) => Some(path.trim_end_matches('/')),
        Some(PathMatch::Exact(_) | PathMatch::Regex(_)) => None,
    }
}

impl Entry {
    fn path(&self) -> Path<'_> {
        match &self.chosen.matched().path {
            Some(PathMatch::Exact(path)) => Path::Exact(path),
            Some(PathMatch::Regex(_)) => Path::Regex,
            other => Path::Prefix(prefix(other.as_ref()).unwrap_or_default()),
        }
    }

    /// The rule's own text where that is what is compared.
    fn prefix_key(&self, prefix: &str) -> Str {
        match &self.chosen.matched().path {
            Some(PathMatch::Prefix(path)) if **path == *prefix => path.clone(),
            _ => prefix.into(),
        }
    }

    /// Sorts what comes first first, and the same paths together.
    fn rank(&self) -> Rank<'_> {
        let of = self.chosen.matched();
        let (kind, length, text) = match &of.path {
            Some(PathMatch::Exact(path)) => (2, path.len(), &**path),
            Some(PathMatch::Regex(expression)) => (1, of.specificity.map_or(expression.len(), |s| s as usize), ""),
            other => {
                let text = prefix(other.as_ref()).unwrap_or_default();
                (0, text.len(), text)
            }
        };
        (Reverse((kind, length)), text, Reverse((of.method.is_some(), of.headers.len(), of.query.len())))
    }

    fn matches(&self, r: &RequestView<'_>) -> bool {
        let of = self.chosen.matched();
        let compiled = self.compiled.as_deref();
        let path = match &of.path {
            None => true,
            Some(PathMatch::Exact(path)) => r.path == &**path,
            Some(PathMatch::Regex(_)) => compiled.and_then(|c| c.path.as_ref()).is_some_and(|e| e.is_match(r.path)),
            Some(PathMatch::Prefix(path)) => {
                let rest = r.path.strip_prefix(path.trim_end_matches('/'));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        };
        let header = |n: usize| compiled.and_then(|c| c.headers[n].as_ref());
        let query = |n: usize| compiled.and_then(|c| c.query[n].as_ref());
        path && of.method.as_ref().is_none_or(|m| r.method.as_str() == &**m)
            && of.headers.iter().enumerate().all(|(n, t)| t.matches_header(header(n), r.headers))
            && of.query.iter().enumerate().all(|(n, t)| t.matches_query(query(n), r.query))
    }
}

impl ValueTest {
    fn new(m: &ValueMatch) -> Result<Self, BadExpression> {
        let compiled = m.regex.then(|| whole(&m.value)).transpose()?;
        Ok(Self { tested: m.clone(), compiled })
    }
}

impl ValueMatch {
    fn fits(&self, compiled: Option<&Regex>, value: &str) -> bool {
        match (self.regex, compiled) {
            (false, _) => value == &*self.value,
            (true, compiled) => compiled.is_some_and(|e| e.is_match(value)),
        }
    }

    fn matches_header(&self, compiled: Option<&Regex>, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&*self.name).iter();
        let Some(first) = values.next() else { return false };
        match (first.to_str(), values.next()) {
            (Ok(one), None) => self.fits(compiled, one),
            // Several values are one, with commas between (RFC 9110 section 5.3).
            (Ok(_), Some(_)) => {
                let all: Option<Vec<&str>> = headers.get_all(&*self.name).iter().map(|v| v.to_str().ok()).collect();
                all.is_some_and(|all| self.fits(compiled, &all.join(",")))
            }
            (Err(_), _) => false,
        }
    }

    /// The first value of a parameter counts (Gateway API, `HTTPQueryParamMatch`).
    fn matches_query(&self, compiled: Option<&Regex>, query: &str) -> bool {
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        pairs.find(|(name, _)| *name == *self.name).is_some_and(|(_, value)| self.fits(compiled, &value))
    }
}
