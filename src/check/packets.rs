//! What a packet filter would do with one packet: reads what `nft -j list table` prints (libnftables-json(5)) and walks it.
//!
//! Pure. A match that is not understood may be true or false, and both ways are followed, so the answer is honest: yes, no, or
//! cannot tell. Rules of meshd's own tables are left out.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::Value;

use crate::intercept::rules::{REPLIES, TABLE};

/// Bound on the rules walked for one packet; chains may jump to each other.
const MAX_STEPS: usize = 20_000;
/// The kernel's own bound on jumps.
const MAX_DEPTH: usize = 16;
/// Source ports of ordinary connections.
const EPHEMERAL: (u64, u64) = (32_768, 60_999);

/// The first packet of a TCP connection.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
    /// The interface it came in by, or goes out by: empty for the other one.
    pub(super) input: String,
    pub(super) output: String,
    pub(super) mark: u32,
}

/// What may become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Passes,
    Dropped,
    /// Some rule was not understood.
    Unknown,
}

#[derive(Debug)]
struct Chain {
    hook: Option<String>,
    kind: String,
    priority: i64,
    drops: bool,
    rules: Vec<(u64, Vec<Value>)>,
}

type Name = (String, String, String);

/// Somebody else's rules.
#[derive(Debug, Default)]
pub(super) struct Rules {
    chains: HashMap<Name, Chain>,
    sets: HashMap<Name, Vec<Value>>,
}

/// Whether a match holds: `None` when it is not understood.
type Holds = Option<bool>;

/// What a chain may lead to.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    accept: bool,
    drop: bool,
    through: bool,
}

impl Ends {
    const ANY: Ends = Ends { accept: true, drop: true, through: true };
}

enum Then {
    Next,
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Rules {
    /// Adds those that `nft -j list table` (or `list ruleset`) printed; `None` if that is something else.
    pub(super) fn add(&mut self, json: &str) -> Option<()> {
        let all: Value = serde_json::from_str(json).ok()?;
        let rules = self;
        for object in all.get("nftables")?.as_array()? {
            if let Some(chain) = object.get("chain") {
                let name = name(chain, "name")?;
                let text = |key: &str| chain.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                let hook = chain.get("hook").and_then(Value::as_str).map(str::to_owned);
                let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or(0);
                let drops = text("policy") == "drop";
                rules.chains.insert(name, Chain { hook, kind: text("type"), priority, drops, rules: Vec::new() });
            } else if let Some(rule) = object.get("rule") {
                let expressions = rule.get("expr").and_then(Value::as_array).cloned().unwrap_or_default();
                let handle = rule.get("handle").and_then(Value::as_u64).unwrap_or(0);
                rules.chains.get_mut(&name(rule, "chain")?)?.rules.push((handle, expressions));
            } else if let Some(set) = object.get("set").or_else(|| object.get("map")) {
                let elements = set.get("elem").and_then(Value::as_array).cloned().unwrap_or_default();
                rules.sets.insert(name(set, "name")?, elements);
            }
        }
        rules.chains.retain(|(family, table, _), _| !(family == "inet" && [TABLE, REPLIES].contains(&table.as_str())));
        Some(())
    }

    /// What becomes of a packet at these hooks, one after another.
    pub(super) fn fate(&self, packet: &Packet, hooks: &[&str]) -> Fate {
        let mut fate = Fate::Passes;
        for hook in hooks {
            for (name, chain) in self.at(hook, packet.source) {
                let mut steps = 0;
                let mut ends = self.walk(name, chain, packet, 0, &mut steps);
                if ends.through {
                    ends.drop |= chain.drops;
                    ends.accept |= !chain.drops;
                }
                match (ends.accept, ends.drop) {
                    (false, true) => return if fate == Fate::Unknown { fate } else { Fate::Dropped },
                    (true, false) => {}
                    _ => fate = Fate::Unknown,
                }
            }
        }
        fate
    }

    /// Rules of the input hook that look at where a TCP packet comes from, in words.
    pub(super) fn by_source(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo: Vec<&Name> =
            self.chains.iter().filter(|(_, c)| c.hook.as_deref() == Some("input")).map(|(n, _)| n).collect();
        let mut seen = std::collections::BTreeSet::new();
        while let Some(name) = todo.pop() {
            let Some(chain) = self.chains.get(name).filter(|_| seen.insert(name)) else { continue };
            for (handle, expressions) in &chain.rules {
                if is_by_source(expressions) {
                    found.push(format!("{} {} chain {} rule {handle}", name.0, name.1, name.2));
                }
                for target in expressions.iter().flat_map(targets) {
                    let next = (name.0.clone(), name.1.clone(), target);
                    todo.extend(self.chains.get_key_value(&next).map(|(n, _)| n));
                }
            }
        }
        found.sort();
        found
    }

    /// The base chains that see packets of this address family at a hook, in order.
    fn at(&self, hook: &str, ip: IpAddr) -> Vec<(&Name, &Chain)> {
        let family = if ip.is_ipv4() { "ip" } else { "ip6" };
        let here = |(name, chain): &(&Name, &Chain)| {
            chain.hook.as_deref() == Some(hook) && chain.kind != "nat" && [family, "inet"].contains(&name.0.as_str())
        };
        let mut found: Vec<_> = self.chains.iter().filter(here).collect();
        found.sort_by_key(|(name, chain)| (chain.priority, *name));
        found
    }

    fn walk(&self, name: &Name, chain: &Chain, packet: &Packet, depth: usize, steps: &mut usize) -> Ends {
        let mut ends = Ends::default();
        'rules: for (_, expressions) in &chain.rules {
            *steps += 1;
            if *steps > MAX_STEPS || depth > MAX_DEPTH {
                return Ends::ANY;
            }
            // Whether every match of the rule so far is known to hold.
            let mut certain = true;
            for (condition, then) in expressions.iter().flat_map(|e| self.effects(name, e, packet)) {
                if condition == Some(false) {
                    continue 'rules;
                }
                if matches!(then, Then::Next) {
                    certain &= condition == Some(true);
                    continue;
                }
                let stops = self.follow(name, then, packet, depth, steps, &mut ends);
                if stops && condition == Some(true) {
                    if certain {
                        return ends;
                    }
                    continue 'rules;
                }
            }
        }
        ends.through = true;
        ends
    }

    /// Follows a verdict; whether nothing after it is reached.
    fn follow(&self, name: &Name, then: Then, packet: &Packet, depth: usize, steps: &mut usize, ends: &mut Ends) -> bool {
        let (target, returns) = match then {
            Then::Next => return false,
            Then::Accept => {
                ends.accept = true;
                return true;
            }
            Then::Drop => {
                ends.drop = true;
                return true;
            }
            Then::Return => {
                ends.through = true;
                return true;
            }
            Then::Jump(target) => (target, true),
            Then::Goto(target) => (target, false),
        };
        let target = (name.0.clone(), name.1.clone(), target);
        let inner = self.chains.get(&target).map_or(Ends::ANY, |c| self.walk(&target, c, packet, depth + 1, steps));
        ends.accept |= inner.accept;
        ends.drop |= inner.drop;
        ends.through |= inner.through && !returns;
        !(returns && inner.through)
    }

    /// What one expression does: a condition, and what then. A plain match has [`Then::Next`], and ends the rule if it does not hold.
    fn effects(&self, name: &Name, expression: &Value, packet: &Packet) -> Vec<(Holds, Then)> {
        let Some((kind, body)) = expression.as_object().and_then(|o| o.iter().next()) else { return vec![(None, Then::Next)] };
        let always = |then| vec![(Some(true), then)];
        match kind.as_str() {
            "match" => vec![(self.holds(name, body, packet), Then::Next)],
            "vmap" => self.mapped(name, body, packet),
            "accept" | "drop" | "reject" | "return" | "jump" | "goto" | "continue" => always(verdict(kind, body)),
            "counter" | "log" | "mangle" | "notrack" | "comment" | "set" | "flow" | "ct helper" => Vec::new(),
            // iptables' own extensions: a match, or a target such as REJECT.
            "xt" => vec![(None, Then::Next), (None, Then::Drop)],
            "queue" | "tproxy" | "synproxy" => vec![(None, Then::Drop), (None, Then::Accept)],
            _ => vec![(None, Then::Next)],
        }
    }

    fn mapped(&self, name: &Name, body: &Value, packet: &Packet) -> Vec<(Holds, Then)> {
        let left = body.get("key").map_or(Left::Unknown, |key| left(key, packet));
        let data = body.get("data");
        let named = data.and_then(Value::as_str).and_then(|s| self.set(name, s.strip_prefix('@')?));
        let pairs = named.or_else(|| data.and_then(|d| d.get("set")).and_then(Value::as_array));
        let Some(pairs) = pairs else { return vec![(None, Then::Drop), (None, Then::Accept)] };
        let mut effects = Vec::new();
        for pair in pairs {
            let (Some(key), Some(then)) = (pair.get(0), pair.get(1)) else { continue };
            let Some((kind, body)) = then.as_object().and_then(|o| o.iter().next()) else { continue };
            let holds = self.equals(name, &left, key);
            if holds != Some(false) {
                effects.push((holds, verdict(kind, body)));
            }
        }
        effects
    }

    fn set(&self, place: &Name, set: &str) -> Option<&Vec<Value>> {
        self.sets.get(&(place.0.clone(), place.1.clone(), set.to_owned()))
    }

    fn holds(&self, name: &Name, body: &Value, packet: &Packet) -> Holds {
        let (operator, right) = (body.get("op")?.as_str()?, body.get("right")?);
        let left = left(body.get("left")?, packet);
        // The packet is of another family or protocol: not even "is not" holds.
        if matches!(left, Left::Absent) {
            return Some(false);
        }
        match operator {
            "==" | "in" => self.equals(name, &left, right),
            "!=" => self.equals(name, &left, right).map(|h| !h),
            "<" | "<=" | ">" | ">=" => {
                let (Left::Number(low, high), Some(bound)) = (&left, right.as_u64()) else { return None };
                let (some, all) = match operator {
                    "<" => (*low < bound, *high < bound),
                    "<=" => (*low <= bound, *high <= bound),
                    ">" => (*high > bound, *low > bound),
                    _ => (*high >= bound, *low >= bound),
                };
                if some == all { Some(all) } else { None }
            }
            _ => None,
        }
    }

    fn equals(&self, name: &Name, left: &Left, right: &Value) -> Holds {
        match right {
            Value::Array(any) => self.any(name, left, any),
            Value::Object(object) => {
                let (kind, body) = object.iter().next()?;
                match (kind.as_str(), left) {
                    ("set", _) => self.any(name, left, body.as_array()?),
                    ("elem", _) => self.equals(name, left, body.get("val")?),
                    ("range", Left::Number(low, high)) => within((*low, *high), (body.get(0)?.as_u64()?, body.get(1)?.as_u64()?)),
                    ("range", Left::Address(ip)) => Some((address(body.get(0)?)?..=address(body.get(1)?)?).contains(ip)),
                    ("prefix", Left::Address(ip)) => {
                        let length = u8::try_from(body.get("len")?.as_u64()?).ok()?;
                        Some(in_prefix(*ip, address(body.get("addr")?)?, length))
                    }
                    ("concat", Left::Several(all)) => {
                        let mut sure = Some(true);
                        for (left, right) in all.iter().zip(body.as_array()?) {
                            match self.equals(name, left, right) {
                                Some(true) => {}
                                Some(false) => return Some(false),
                                None => sure = None,
                            }
                        }
                        sure
                    }
                    _ => None,
                }
            }
            Value::String(text) => match (text.strip_prefix('@'), left) {
                (Some(set), _) => self.any(name, left, self.set(name, set)?),
                (None, Left::Word(word)) => Some(match text.strip_suffix('*') {
                    Some(start) => word.starts_with(start),
                    None => word == text,
                }),
                (None, Left::Address(ip)) => Some(*ip == text.parse::<IpAddr>().ok()?),
                _ => None,
            },
            Value::Number(n) => match left {
                Left::Number(low, high) => within((*low, *high), (n.as_u64()?, n.as_u64()?)),
                _ => None,
            },
            // `fib saddr . iif oif missing`
            Value::Bool(there) => matches!(left, Left::Route).then_some(*there),
            Value::Null => None,
        }
    }

    fn any(&self, name: &Name, left: &Left, all: &[Value]) -> Holds {
        let mut sure = Some(false);
        for one in all {
            match self.equals(name, left, one) {
                Some(true) => return Some(true),
                Some(false) => {}
                None => sure = None,
            }
        }
        sure
    }
}

/// What a packet shows to the left side of a match.
enum Left {
    /// The packet has no such field.
    Absent,
    Unknown,
    /// Between these two.
    Number(u64, u64),
    Word(String),
    Address(IpAddr),
    /// The way back to its source, which is there.
    Route,
    Several(Vec<Left>),
}

fn left(expression: &Value, packet: &Packet) -> Left {
    let Some((kind, body)) = expression.as_object().and_then(|o| o.iter().next()) else { return Left::Unknown };
    let text = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or_default();
    let word = |w: &str| Left::Word(w.to_owned());
    let number = |n: u64| Left::Number(n, n);
    let v4 = packet.source.is_ipv4();
    match kind.as_str() {
        "payload" => match (text("protocol"), text("field")) {
            ("ip", _) if !v4 => Left::Absent,
            ("ip6", _) if v4 => Left::Absent,
            ("ip" | "ip6", "saddr") => Left::Address(packet.source),
            ("ip" | "ip6", "daddr") => Left::Address(packet.destination),
            ("ip", "protocol") | ("ip6", "nexthdr") => word("tcp"),
            ("tcp" | "th", "dport") => number(packet.port.into()),
            ("tcp" | "th", "sport") => Left::Number(EPHEMERAL.0, EPHEMERAL.1),
            ("tcp", "flags") => word("syn"),
            ("udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite" | "arp", _) => Left::Absent,
            _ => Left::Unknown,
        },
        // Of the flags that a rule masks only SYN is set.
        "&" => match (body.get(0).map(|v| left(v, packet)), body.get(1)) {
            (Some(Left::Word(flag)), Some(mask)) if contains(mask, &flag) => Left::Word(flag),
            (Some(Left::Number(low, high)), Some(mask)) if low == high && mask.is_u64() => {
                number(low & mask.as_u64().unwrap_or(0))
            }
            _ => Left::Unknown,
        },
        "meta" => match text("key") {
            "l4proto" => word("tcp"),
            "nfproto" => word(if v4 { "ipv4" } else { "ipv6" }),
            "protocol" => word(if v4 { "ip" } else { "ip6" }),
            "iif" | "iifname" => word(&packet.input),
            "oif" | "oifname" => word(&packet.output),
            "mark" => number(packet.mark.into()),
            "pkttype" => word("host"),
            _ => Left::Unknown,
        },
        "ct" => match text("key") {
            "state" => word("new"),
            "direction" => word("original"),
            _ => Left::Unknown,
        },
        "fib" => {
            let flags = body.get("flags").map(ToString::to_string).unwrap_or_default();
            match text("result") {
                "type" if flags.contains("daddr") => word(if packet.input.is_empty() { "unicast" } else { "local" }),
                "type" => Left::Unknown,
                _ if flags.contains("saddr") => Left::Route,
                _ => Left::Unknown,
            }
        }
        "concat" => Left::Several(body.as_array().into_iter().flatten().map(|e| left(e, packet)).collect()),
        _ => Left::Unknown,
    }
}

fn verdict(kind: &str, body: &Value) -> Then {
    let target = || body.get("target").and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind {
        "accept" => Then::Accept,
        "drop" | "reject" => Then::Drop,
        "return" => Then::Return,
        "jump" => Then::Jump(target()),
        "goto" => Then::Goto(target()),
        _ => Then::Next,
    }
}

/// The chains an expression leads to.
fn targets(expression: &Value) -> Vec<String> {
    let one = |v: &Value| {
        let to = v.get("jump").or_else(|| v.get("goto"))?;
        Some(to.get("target")?.as_str()?.to_owned())
    };
    let pairs = expression.get("vmap").and_then(|m| m.get("data")?.get("set")?.as_array());
    let mapped = pairs.into_iter().flatten().filter_map(|pair| one(pair.get(1)?));
    one(expression).into_iter().chain(mapped).collect()
}

/// Whether a rule decides about TCP by the sender's address: not of loopback or link-local, and not of another protocol.
fn is_by_source(expressions: &[Value]) -> bool {
    let matches = || expressions.iter().filter_map(|e| e.get("match"));
    let payload = |m: &Value| {
        let p = m.get("left")?.get("payload")?;
        Some((p.get("protocol")?.as_str()?.to_owned(), p.get("field")?.as_str()?.to_owned()))
    };
    let about = |m: &Value| payload(m).unwrap_or_default();
    let other_protocol = matches().any(|m| {
        let (protocol, field) = about(m);
        let named = field == "protocol"
            || field == "nexthdr"
            || m.get("left").and_then(|l| l.get("meta")?.get("key")?.as_str()) == Some("l4proto");
        ["udp", "icmp", "icmpv6", "sctp"].contains(&protocol.as_str())
            || named && m.get("right").is_some_and(|r| !contains(r, "tcp"))
    });
    let by_source = matches().any(|m| about(m).1 == "saddr" && m.get("right").is_some_and(|r| !is_inside(r)));
    let decides = expressions.iter().any(|e| ["accept", "drop", "reject", "jump", "goto"].iter().any(|v| e.get(v).is_some()));
    by_source && decides && !other_protocol
}

/// Whether an address or network is loopback or link-local, where no member is.
fn is_inside(right: &Value) -> bool {
    let text = right.as_str().or_else(|| right.get("prefix")?.get("addr")?.as_str());
    match text.and_then(|t| t.parse().ok()) {
        Some(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_link_local(),
        Some(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unicast_link_local(),
        None => false,
    }
}

fn contains(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => text == word,
        Value::Array(all) => all.iter().any(|v| contains(v, word)),
        Value::Object(object) => object.values().any(|v| contains(v, word)),
        _ => false,
    }
}

fn name(object: &Value, key: &str) -> Option<Name> {
    let text = |key: &str| Some(object.get(key)?.as_str()?.to_owned());
    Some((text("family")?, text("table")?, text(key)?))
}

fn address(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn in_prefix(ip: IpAddr, network: IpAddr, length: u8) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    };
    let ((a, width), (b, other)) = (bits(ip), bits(network));
    width == other && (length == 0 || (a ^ b) >> (128 - u32::from(length.min(width))) == 0)
}

/// Whether all, none or some of the numbers from `low` to `high` are in a range.
fn within((low, high): (u64, u64), (from, to): (u64, u64)) -> Holds {
    if from <= low && high <= to {
        Some(true)
    } else if high < from || to < low {
        Some(false)
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
