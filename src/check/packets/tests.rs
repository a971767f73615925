use super::*;

impl Rules {
    /// Those of one listing.
    pub(in crate::check) fn parse(json: &str) -> Option<Self> {
        let mut rules = Self::default();
        rules.add(json).map(|()| rules)
    }
}

/// What nft 1.0.6 printed for the rules in the comment above each rule set.
fn rules(objects: &str) -> Rules {
    Rules::parse(&format!(r#"{{"nftables": [{{"metainfo": {{"json_schema_version": 1}}}}, {objects}]}}"#)).unwrap()
}

fn to(port: u16, source: &str) -> Packet {
    let source: IpAddr = source.parse().unwrap();
    let destination = if source.is_ipv4() { "192.168.77.2" } else { "fd77::2" };
    let (input, output) = ("eth0".to_owned(), String::new());
    Packet { source, destination: destination.parse().unwrap(), port, input, output, mark: 0 }
}

const HEAD: &str = r#"{"table": {"family": "inet", "name": "f", "handle": 1}},
  {"chain": {"family": "inet", "table": "f", "name": "web", "handle": 1}},
  {"chain": {"family": "inet", "table": "f", "name": "input", "handle": 2, "type": "filter", "hook": "input", "prio": 0, "policy": "POLICY"}}"#;

fn chain(policy: &str, expressions: &[&str]) -> Rules {
    let mut text = HEAD.replace("POLICY", policy);
    for (number, expression) in expressions.iter().enumerate() {
        let (chain, expression) = expression.strip_prefix("web:").map_or(("input", *expression), |e| ("web", e));
        text += &format!(
            r#", {{"rule": {{"family": "inet", "table": "f", "chain": "{chain}", "handle": {number}, "expr": [{expression}]}}}}"#
        );
    }
    rules(&text)
}

const DPORT: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": RIGHT}}"#;
const SADDR: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": RIGHT}}"#;
const ACCEPT: &str = r#", {"accept": null}"#;

fn dport(right: &str) -> String {
    DPORT.replace("RIGHT", right)
}

#[track_caller]
fn fate(rules: &Rules, packet: &Packet, expected: Fate) {
    assert_eq!(rules.fate(packet, &["input"]), expected, "{packet:?}");
}

#[test]
fn ports_ranges_and_policies() {
    let open = chain("drop", &[&(dport(r#"{"set": [22, {"range": [80, 90]}]}"#) + ACCEPT)]);
    fate(&open, &to(22, "192.168.77.1"), Fate::Passes);
    fate(&open, &to(90, "fd77::1"), Fate::Passes);
    fate(&open, &to(91, "192.168.77.1"), Fate::Dropped);
    let closed =
        chain("accept", &[&(dport("6374") + r#", {"counter": {"packets": 0, "bytes": 0}}, {"reject": {"type": "tcp reset"}}"#)]);
    fate(&closed, &to(6374, "192.168.77.1"), Fate::Dropped);
    fate(&closed, &to(6375, "192.168.77.1"), Fate::Passes);
    assert_eq!(closed.fate(&to(6374, "192.168.77.1"), &["output"]), Fate::Passes, "another hook");
    // Source ports are not known exactly.
    let sport = |range: &str| {
        chain(
            "drop",
            &[&format!(
                r#"{{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "sport"}}}}, "right": {{"range": {range}}}}}}}, {{"accept": null}}"#
            )],
        )
    };
    fate(&sport("[1024, 65535]"), &to(1, "192.168.77.1"), Fate::Passes);
    fate(&sport("[1, 1023]"), &to(1, "192.168.77.1"), Fate::Dropped);
    fate(&sport("[40000, 50000]"), &to(1, "192.168.77.1"), Fate::Unknown);
}

#[test]
fn sources_families_and_other_protocols() {
    let lan = SADDR.replace("RIGHT", r#"{"prefix": {"addr": "192.168.77.0", "len": 24}}"#);
    let rules = chain("drop", &[&format!("{}, {lan}{ACCEPT}", dport("6374"))]);
    fate(&rules, &to(6374, "192.168.77.9"), Fate::Passes);
    fate(&rules, &to(6374, "192.168.78.9"), Fate::Dropped);
    fate(&rules, &to(6374, "fd77::1"), Fate::Dropped);
    // "Is not" of a field that the packet does not have is no match either.
    let not = SADDR.replace("==", "!=").replace("RIGHT", r#""192.168.77.1""#);
    let rules = chain("accept", &[&format!(r#"{not}, {{"drop": null}}"#)]);
    fate(&rules, &to(1, "192.168.77.1"), Fate::Passes);
    fate(&rules, &to(1, "192.168.77.2"), Fate::Dropped);
    fate(&rules, &to(1, "fd77::1"), Fate::Passes);
    let udp = dport("5353").replace("tcp", "udp");
    fate(&chain("accept", &[&format!(r#"{udp}, {{"drop": null}}"#)]), &to(5353, "192.168.77.1"), Fate::Passes);
}

#[test]
fn states_flags_interfaces_and_jumps() {
    let state = r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}]]}}}"#;
    let flags = r#"{"match": {"op": "==", "left": {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["fin", "syn", "rst", "ack"]]}, "right": "syn"}}, {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["new", "untracked"]}}"#;
    let lo = r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}, {"accept": null}"#;
    let jump = dport("443") + r#", {"jump": {"target": "web"}}"#;
    let web = format!("web:{}{ACCEPT}", SADDR.replace("RIGHT", r#""192.168.77.1""#));
    let rules = chain("drop", &[lo, state, &jump, &web, &format!("{flags}, {}{ACCEPT}", dport("80"))]);
    fate(&rules, &to(443, "192.168.77.1"), Fate::Passes);
    fate(&rules, &to(443, "192.168.77.3"), Fate::Dropped);
    fate(&rules, &to(80, "192.168.77.3"), Fate::Passes);
    fate(&rules, &Packet { input: "lo".into(), ..to(9, "192.168.77.3") }, Fate::Passes);
    assert_eq!(rules.by_source(), ["inet f chain web rule 3"]);
    // The same with `goto`: what follows is not reached.
    let rules = chain("accept", &[&(dport("443") + r#", {"goto": {"target": "web"}}"#), r#"{"drop": null}"#]);
    fate(&rules, &to(443, "192.168.77.3"), Fate::Passes);
    fate(&rules, &to(444, "192.168.77.3"), Fate::Dropped);
    let rules = chain("accept", &[&(dport("443") + r#", {"jump": {"target": "gone"}}"#)]);
    fate(&rules, &to(443, "192.168.77.3"), Fate::Unknown);
}

#[test]
fn named_sets_and_the_honest_answer() {
    let set = r#"{"set": {"family": "inet", "name": "lan", "table": "f", "type": "ipv4_addr", "handle": 3, "elem": ["10.0.0.1", {"range": ["192.168.77.1", "192.168.77.5"]}]}}, "#;
    let named = SADDR.replace("RIGHT", r#""@lan""#);
    let text = HEAD.replace("POLICY", "drop")
        + &format!(
            r#", {set}{{"rule": {{"family": "inet", "table": "f", "chain": "input", "handle": 9, "expr": [{named}{ACCEPT}]}}}}"#
        );
    let named = rules(&text);
    fate(&named, &to(1, "192.168.77.5"), Fate::Passes);
    fate(&named, &to(1, "192.168.77.6"), Fate::Dropped);
    // A match of iptables that nft cannot show: it may hold or not.
    let opaque = chain("accept", &[r#"{"xt": {"type": "match", "name": "tcp"}}, {"drop": null}"#]);
    fate(&opaque, &to(1, "192.168.77.1"), Fate::Unknown);
    // A limit holds or not, and the policy decides the rest the same way.
    let limited = chain("accept", &[r#"{"limit": {"rate": 10, "per": "second"}}, {"accept": null}"#]);
    fate(&limited, &to(1, "192.168.77.1"), Fate::Passes);
    let reverse = r#"{"match": {"op": "==", "left": {"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, "right": false}}, {"drop": null}"#;
    fate(&chain("accept", &[reverse]), &to(1, "fd77::1"), Fate::Passes);
    assert!(Rules::parse("nft: syntax error").is_none() && Rules::parse("{}").is_none());
}

#[test]
fn our_own_tables_are_left_out_and_loopback_is_no_source() {
    let own = HEAD.replace(r#""f""#, r#""meshd""#).replace("POLICY", "drop");
    fate(&rules(&own), &to(1, "192.168.77.1"), Fate::Passes);
    let spoof = SADDR.replace("==", "!=").replace("RIGHT", r#"{"prefix": {"addr": "127.0.0.0", "len": 8}}"#);
    let lo = r#"{"match": {"op": "==", "left": {"meta": {"key": "iif"}}, "right": "lo"}}"#;
    let rules = chain("accept", &[&format!(r#"{lo}, {spoof}, {{"drop": null}}"#)]);
    fate(&rules, &to(1, "192.168.77.1"), Fate::Passes);
    fate(&rules, &Packet { input: "lo".into(), ..to(1, "192.168.77.1") }, Fate::Dropped);
    assert!(rules.by_source().is_empty());
}
