//! Layers, limits and refusals of the configuration, without the process environment.

use std::ffi::OsString;
use std::io::Write as _;

use proptest::prelude::*;

use super::*;

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment::from_variables(variables.iter().map(|(n, v)| (OsString::from(n), OsString::from(v))))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load(text: &str, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let file = file(text);
    let flags: Vec<_> = flags.iter().map(|(n, v)| (Key::named(n).unwrap(), (*v).to_owned())).collect();
    Config::load(Some(file.path()), &environment(variables), &flags)
}

#[test]
fn later_layers_win_and_origins_are_remembered() {
    let text = "mode = \"strict\"\nport = 7000\nzone = \"shed\"\npeers = [\"192.0.2.1\", \"[2001:db8::1]:99\", \"pi-2.local\"]\n";
    let config = load(text, &[("MESHD_PORT", "7001"), ("MESHD_SKIP_PORTS", "22, 23")], &[("port", "7002")]).unwrap();
    assert_eq!((config.mode, config.port, config.zone.as_deref()), (Mode::Strict, 7002, Some("shed")));
    assert_eq!(
        config.peers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["192.0.2.1:6374", "[2001:db8::1]:99", "pi-2.local:6374"]
    );
    assert_eq!(config.skip_ports, [22, 23].into());
    assert_eq!(config.drain, DRAIN);
    assert!(matches!(config.origin("mode"), Origin::File(_)));
    assert_eq!(config.origin("port"), &Origin::Flag("--port".into()));
    assert_eq!(config.origin("skip_ports"), &Origin::Environment("MESHD_SKIP_PORTS".into()));
    assert_eq!(config.origin("drain"), &Origin::Default);
}

#[test]
fn defaults_are_valid_and_shown_as_they_are_read() {
    let defaults = load("", &[], &[]).unwrap();
    let shown: Vec<_> = KEYS.iter().map(|k| (k, k.show(&defaults))).filter(|(_, v)| !v.is_empty()).collect();
    let text: String = shown.iter().map(|(k, v)| format!("{} = {v}\n", k.name)).collect();
    let again = load(&text, &[], &[]).unwrap();
    for (key, value) in &shown {
        assert_eq!(&key.show(&again), value, "{}", key.name);
        assert!(matches!(again.origin(key.name), Origin::File(_)));
    }
    assert_eq!(KEYS.len() - shown.len(), 4, "admin_address, zone, trust_domain and fleet_token_file are not set by default");
}

#[test]
fn every_setting_has_one_name_in_each_place() {
    let mut flags: Vec<_> = KEYS.iter().map(|k| k.flag).collect();
    flags.sort_unstable();
    flags.dedup();
    assert_eq!(flags.len(), KEYS.len());
    for key in KEYS {
        assert_eq!(key.flag.replace('-', "_"), key.name);
    }
}

#[test]
fn misspelt_keys_are_refused_with_the_right_one() {
    for (text, hint) in
        [("prot = 1", "port"), ("host-name = \"a\"", "host_name"), ("mods = \"strict\"", "mode"), ("peer = []", "peers")]
    {
        match load(text, &[], &[]).unwrap_err() {
            ConfigError::Unknown { hint: h, .. } => assert_eq!(h, Some(hint), "{text}"),
            other => panic!("{text}: {other}"),
        }
    }
    let none = load("[frobnicate]\nx = 1", &[], &[]).unwrap_err();
    assert!(matches!(none, ConfigError::Unknown { hint: None, .. }), "{none}");
}

#[test]
fn wrong_values_say_what_is_right_and_where_they_are() {
    for (text, expected) in [
        ("mode = \"strct\"", "did you mean \"strict\""),
        ("port = 0", "1 to 65535"),
        ("port = 70000", "1 to 65535"),
        ("port = [1]", "one value"),
        ("port = 1.5", "not a TOML float"),
        ("drain = 30", "with a unit"),
        ("drain = \"11m\"", "0s to 10m"),
        ("keepalive = \"0s\"", "1s to 1h"),
        ("svid_lifetime = \"1s\"", "2s to 30d"),
        ("state_dir = \"lib\"", "absolute path"),
        ("host_name = \"Pi One\"", "not a host name"),
        ("peers = \"192.0.2.1\"", "expected a list"),
        ("peers = [\"a b\"]", "expected an address or a name"),
        ("peers = [\"192.0.2.300\"]", "expected an address or a name"),
        ("peers = [\"fd00::1:x\"]", "expected an address or a name"),
        ("interfaces = [\"eth/0\"]", "network interface"),
        ("trust_domain = \"Example.org\"", "not a trust domain"),
        ("mdns = \"maybe\"", "true or false"),
        ("zone = \"a b\"", "1 to 63"),
        ("log_level = \"loud\"", "error, warn, info"),
    ] {
        let error = load(text, &[], &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = load("", &[("MESHD_PORT", "x")], &[]).unwrap_err().to_string();
    assert!(error.contains("environment, MESHD_PORT"), "{error}");
    let error = load("", &[], &[("drain", "x")]).unwrap_err().to_string();
    assert!(error.contains("flag --drain"), "{error}");
}

#[test]
fn values_that_cannot_go_together() {
    let error = load("port = 6376", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("port and admin_port are both 6376"), "{error}");
    let long = format!("run_dir = \"/{}\"", "a".repeat(100));
    assert!(load(&long, &[], &[]).unwrap_err().to_string().contains("run_dir is too long"));
    let fits = format!("run_dir = \"/{}\"", "a".repeat(106 - api_socket_length()));
    assert!(load(&fits, &[], &[]).is_ok());
}

fn api_socket_length() -> usize {
    crate::api::SOCKET.len() + 1
}

#[test]
fn files_that_cannot_be_read() {
    let gone = Config::load(Some(Path::new("/nonexistent/meshd.toml")), &environment(&[]), &[]);
    assert!(matches!(gone, Err(ConfigError::Read { .. })));
    let gone = Config::load(None, &environment(&[("MESHD_CONFIG", "/nonexistent/meshd.toml")]), &[]);
    assert!(matches!(gone, Err(ConfigError::Read { .. })));
    assert!(matches!(load(&"#".repeat(70_000), &[], &[]), Err(ConfigError::Long { .. })));
    assert!(matches!(load("port = ", &[], &[]), Err(ConfigError::Syntax { .. })));
}

#[test]
fn the_environment_of_others_is_left_alone() {
    // What Kubernetes puts beside a Service named meshd, and a script's own variables.
    let config =
        load("", &[("MESHD_PORT", "tcp://10.43.0.7:6374"), ("MESHD_BIN", "/usr/bin/meshd"), ("MESHD_ZONE", "")], &[]).unwrap();
    assert_eq!(config.port, PORT);
    assert_eq!(config.notes(), [] as [String; 0]);
    let config = load("", &[("MESHD_HOSTNAME", "a")], &[]).unwrap();
    assert!(config.notes()[0].contains("did you mean MESHD_HOST_NAME"), "{:?}", config.notes());
}

#[test]
fn colours_are_refused_by_the_environment() {
    assert!(environment(&[("NO_COLOR", "1")]).plain());
    assert!(environment(&[("TERM", "dumb")]).plain());
    assert!(!environment(&[("NO_COLOR", ""), ("TERM", "xterm")]).plain());
}

proptest! {
    #[test]
    fn no_file_panics(text in "\\PC{0,200}") {
        let _ = Config::defaults().apply_file(Path::new("x"), &text);
    }

    #[test]
    fn no_value_panics_and_what_is_taken_is_shown_as_it_is_read(at in 0..KEYS.len(), value in "[ -~é]{0,40}") {
        let key = &KEYS[at];
        let mut config = Config::defaults();
        if config.set(key.name, &Value::text(&value), Origin::Default).is_ok() {
            let shown = key.show(&config);
            let mut again = Config::defaults();
            if !shown.is_empty() {
                again.apply_file(Path::new("x"), &format!("{} = {shown}", key.name)).unwrap();
            }
            prop_assert_eq!(key.show(&again), shown);
        }
    }

    #[test]
    fn typed_toml_never_panics(at in 0..KEYS.len(), number in any::<i64>(), items in proptest::collection::vec("[a-z0-9.:]{0,12}", 0..5)) {
        let name = KEYS[at].name;
        let _ = Config::defaults().apply_file(Path::new("x"), &format!("{name} = {number}"));
        let _ = Config::defaults().apply_file(Path::new("x"), &format!("{name} = {items:?}"));
    }

    #[test]
    fn peer_addresses_round_trip(text in "[a-z0-9.:\\[\\]_-]{0,30}") {
        if let Ok(peer) = text.parse::<PeerAddress>() {
            prop_assert_eq!(peer.to_string().parse::<PeerAddress>(), Ok(peer));
        }
    }
}
