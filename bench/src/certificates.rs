//! Certificates for everything but meshd, which makes its own: one P-256 root, one leaf for both ends.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Whom the leaf is for.
pub(crate) const NAME: &str = "bench.meshd.internal";

/// Writes `ca.pem`, `cert.pem`, `key.pem` and `both.pem` (leaf and key) into `dir`.
///
/// # Errors
/// When they cannot be made or written.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let root_key = KeyPair::generate()?;
    let mut root = CertificateParams::new(Vec::new())?;
    // OpenSSL takes a leaf with its issuer's name for one that signed itself.
    root.distinguished_name.push(DnType::CommonName, "bench root");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let root_certificate = root.self_signed(&root_key)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec![NAME.to_owned()])?;
    leaf.distinguished_name.push(DnType::CommonName, NAME);
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = leaf.signed_by(&key, &Issuer::new(root, root_key))?;
    let both = format!("{}{}", leaf.pem(), key.serialize_pem());
    for (name, text) in
        [("ca.pem", root_certificate.pem()), ("cert.pem", leaf.pem()), ("key.pem", key.serialize_pem()), ("both.pem", both)]
    {
        let mut file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(dir.join(name))?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
    }
    Ok(())
}
