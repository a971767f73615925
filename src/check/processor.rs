//! What follows from the machine itself: the size of its pages and the ciphers that suit its processor.

use super::findings::{Findings, Verdict};
use crate::api::code;
use crate::identity::provider;

/// What there is to know.
pub(super) struct Facts {
    /// Bytes.
    pub(super) page: usize,
    pub(super) aes: bool,
    /// The cipher suites in the order in which they are offered.
    pub(super) ciphers: Vec<String>,
    /// `std::env::consts::ARCH`
    pub(super) arch: &'static str,
}

impl Facts {
    pub(super) fn read() -> Self {
        let aes = provider::has_aes();
        let ciphers = provider::provider(aes).cipher_suites.iter().map(|s| format!("{:?}", s.suite())).collect();
        Self { page: rustix::param::page_size(), aes, ciphers, arch: std::env::consts::ARCH }
    }
}

pub(super) fn judge(facts: &Facts, found: &mut Findings) {
    let kib = facts.page >> 10;
    let page = match facts.page {
        0x1000 | 0x4000 | 0x10000 => Verdict::ok(format!("{kib} KiB, {}", facts.arch)),
        _ => Verdict::warn(format!("{kib} KiB: nobody has tried that"), "pages of 4, 16 and 64 KiB are known to work: tell us"),
    };
    found.add(code::PAGE_SIZE, "the memory pages are of a size that is known to work", page);
    let first = facts.ciphers.first().map_or("none", String::as_str);
    let instructions = if facts.aes { "AES instructions" } else { "no AES instructions" };
    let detail = format!("{instructions}, so {first} comes first");
    let suits = first.contains("AES") == facts.aes;
    let ciphers = match suits {
        // ring's AES for 32-bit ARM does not use the instructions.
        true if facts.aes && facts.arch == "arm" => Verdict::warn(
            format!("{detail}; a 32-bit program does not use them"),
            "install the 64-bit (aarch64) program if the kernel is 64-bit",
        ),
        true => Verdict::ok(detail),
        false => Verdict::warn(detail, "that is slow here: report it with `meshd version` and /proc/cpuinfo"),
    };
    found.add(code::CIPHERS, "the ciphers suit the processor", ciphers);
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::{Finding, Level::Warn};

    fn of(page: usize, aes: bool, first: &str, arch: &'static str) -> Vec<Finding> {
        let mut found = Findings::of("kernel");
        judge(&Facts { page, aes, ciphers: vec![first.into()], arch }, &mut found);
        found.done()
    }

    #[test]
    fn pages_and_ciphers() {
        assert!(ill(&of(4096, true, "TLS13_AES_128_GCM_SHA256", "x86_64")).is_empty());
        assert!(ill(&of(16_384, false, "TLS13_CHACHA20_POLY1305_SHA256", "aarch64")).is_empty());
        assert_eq!(ill(&of(8192, true, "TLS13_AES_128_GCM_SHA256", "x86_64")), [(code::PAGE_SIZE, Warn)]);
        assert_eq!(ill(&of(4096, false, "TLS13_AES_128_GCM_SHA256", "aarch64")), [(code::CIPHERS, Warn)]);
        assert_eq!(ill(&of(4096, true, "TLS13_AES_128_GCM_SHA256", "arm")), [(code::CIPHERS, Warn)]);
    }

    #[test]
    fn this_machine_is_well() {
        let mut found = Findings::of("kernel");
        judge(&Facts::read(), &mut found);
        assert!(ill(&found.done()).is_empty());
    }
}
