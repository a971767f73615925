//! The configuration file: what is read can be shown, and what is shown is read as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::config::{Config, KEYS};
use meshd_fuzz::within;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Nested arrays cost a few hundred bytes a bracket.
    let Ok(config) = within(256 * 1024 + 1024 * text.len(), || Config::of_text(text)) else { return };
    let show = |config: &Config| -> String {
        KEYS.iter().filter(|k| !k.show(config).is_empty()).map(|k| format!("{} = {}\n", k.name, k.show(config))).collect()
    };
    let shown = show(&config);
    match Config::of_text(&shown) {
        Ok(again) => assert_eq!(show(&again), shown),
        Err(error) => panic!("{shown}\nis shown and not read: {error}"),
    }
});
