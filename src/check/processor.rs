//! What follows from the machine itself: the size of its pages and the ciphers that suit its processor.

use super::findings::{Findings, Verdict};
use crate::api::code;
use crate::identity::provider;

/// What there is to know.
pub(super) struct Facts {
    /// Bytes.
    pub(super) page: usize,
    /// Whether there are AES instructions that this program uses.
    pub(super) aes: bool,
    /// Whether there are some that only a 64-bit program uses.
    pub(super) unused: bool,
    /// The cipher suites in the order in which they are offered.
    pub(super) ciphers: Vec<String>,
    /// `std::env::consts::ARCH`
    pub(super) arch: &'static str,
}

impl Facts {
    pub(super) fn read() -> Self {
        let aes = provider::has_aes();
        let ciphers = provider::provider(aes).cipher_suites.iter().map(|s| format!("{:?}", s.suite())).collect();
        Self { page: rustix::param::page_size(), aes, unused: !aes && unused_aes(), ciphers, arch: std::env::consts::ARCH }
    }
}

/// Whether the kernel says to a 32-bit Arm program that the processor has AES instructions (Linux: `HWCAP2_AES` of
/// arch/arm/include/uapi/asm/hwcap.h). ring uses none on 32-bit Arm.
fn unused_aes() -> bool {
    const HWCAP2_AES: usize = 1;
    cfg!(target_arch = "arm") && rustix::param::linux_hwcap().1 & HWCAP2_AES != 0
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
        true if facts.unused => Verdict::warn(
            format!("{first} comes first: a 32-bit program does not use this processor's AES instructions"),
            "install a 64-bit system, and with it the aarch64 program",
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

    fn of(page: usize, aes: bool, first: &str) -> Vec<Finding> {
        seen(Facts { page, aes, unused: false, ciphers: vec![first.into()], arch: "any" })
    }

    fn seen(facts: Facts) -> Vec<Finding> {
        let mut found = Findings::of("kernel");
        judge(&facts, &mut found);
        found.done()
    }

    #[test]
    fn pages_and_ciphers() {
        assert!(ill(&of(4096, true, "TLS13_AES_128_GCM_SHA256")).is_empty());
        assert!(ill(&of(16_384, false, "TLS13_CHACHA20_POLY1305_SHA256")).is_empty());
        assert_eq!(ill(&of(8192, true, "TLS13_AES_128_GCM_SHA256")), [(code::PAGE_SIZE, Warn)]);
        assert_eq!(ill(&of(4096, false, "TLS13_AES_128_GCM_SHA256")), [(code::CIPHERS, Warn)]);
        let chacha = vec!["TLS13_CHACHA20_POLY1305_SHA256".into()];
        let of_32_bits = Facts { page: 4096, aes: false, unused: true, ciphers: chacha, arch: "arm" };
        assert_eq!(ill(&seen(of_32_bits)), [(code::CIPHERS, Warn)]);
    }

    #[test]
    fn this_machine_is_well() {
        assert!(ill(&seen(Facts::read())).is_empty());
    }
}
