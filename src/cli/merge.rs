//! `meshd merge`: this mesh moves into another one, with all its hosts.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use meshd_ca::keys::PrivateKey;
use meshd_ca::merge::Word;
use zeroize::Zeroizing;

use super::screen::{ago, plain};
use super::{Around, Exit, Failure, Output, join, recovery_key, secret, terminal};
use crate::api::{MergeRequest, MergeStep, MoveRequest, Moving, Secret};
use crate::local::Local;
use crate::recovery;

const EXAMPLES: &str = "\
Every host of this mesh joins the other one, and this one is given up. It takes the recovery key of this mesh, which is asked for unless it still lies on \
this host, its founder; the token is made on an authority of the mesh that stays: `sudo meshd token create --merge`. Hosts that are off follow when \
they come back, for 30 days. A host keeps its name unless it is taken there; the trust domain, the authorities and the recovery key are those of the other mesh \
afterwards. While this goes on a host that has moved and one that has not are strangers to each other: permissive hosts talk in plaintext, a strict one \
refuses those that it knew.

What is meant is shown and asked for first. A token given as an argument can be read by other users in the list of processes.

Examples:
  sudo meshd merge                      # asks for the token
  ssh pi-9 sudo meshd token create --merge | sudo meshd merge --yes -
  sudo meshd merge --recovery-key-file /mnt/usb/key --token-file /mnt/usb/token
  sudo meshd merge --cancel             # whoever has not moved yet stays";

/// Move this mesh, with all its hosts, into another one
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Merge {
    /// The token of the mesh that stays; `-` reads it from standard input; asked for if missing
    #[arg(value_name = "TOKEN", value_parser = secret::argument, conflicts_with = "token_file")]
    token: Option<Secret>,
    /// Read the token from a file
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Take it back for the hosts that have not moved yet
    #[arg(long, conflicts_with_all = ["token", "token_file"])]
    cancel: bool,
    /// Read the recovery key of this mesh from a file
    #[arg(long, value_name = "FILE")]
    recovery_key_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

impl Merge {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        let token = if self.cancel { None } else { Some(join::given(self.token, self.token_file)?) };
        let request = |step| MergeRequest { token: token.as_ref().map(|t: &Zeroizing<String>| t.to_string().into()), step };
        let (question, step) = match token {
            Some(_) => (question(&local.merge(&request(MergeStep::Look)).await?), MergeStep::Move),
            None => ("Keep the hosts in this mesh that have not moved yet?".into(), MergeStep::Stay),
        };
        if !self.yes {
            terminal::confirm(&question)?;
        }
        let (roster, state) = (local.roster().await?, around.config(Vec::new())?.state_dir);
        let key = match (roster.recovery(), &self.recovery_key_file) {
            (Some(_), Some(file)) => Some(recovery_key::signing(&roster, Some(file))?),
            (Some(recovery), None) => {
                let untaken = recovery::untaken(&state, &roster).ok().flatten();
                let untaken = untaken.and_then(|key| recovery.open(&key).ok());
                Some(untaken.map_or_else(|| recovery_key::signing(&roster, None), Ok)?)
            }
            (None, _) => None,
        };
        let mut moving = local.merge(&request(step)).await?;
        if let Some(key) = key {
            sign(&local, &mut moving, &key).await?;
        }
        around.screen(self.output).show(&moving, || text(&moving))?;
        Ok(Exit::Ok)
    }
}

/// Has the recovery key say it.
async fn sign(local: &Local, moving: &mut Moving, key: &PrivateKey) -> Result<(), Failure> {
    let failed = |why: String| Failure::new(Exit::Failed, "this mesh does not move").why(why);
    let unsigned = moving.unsigned.take().ok_or_else(|| failed("the daemon has nothing to be signed".into()))?;
    let word = Word::sign(key, unsigned.0).map_err(|e| failed(e.to_string()))?;
    local.declare_move(&MoveRequest { word }).await?;
    Ok(())
}

fn hosts(n: u32) -> String {
    if n == 1 { "1 host".into() } else { format!("{n} hosts") }
}

/// Both meshes, who moves, and what changes.
fn question(moving: &Moving) -> String {
    let mut text = String::new();
    let from = &moving.from;
    let _ = writeln!(text, "This mesh:  {} ({}), {}", from.mesh, from.trust_domain, hosts(from.members));
    if let Some(to) = &moving.to {
        let _ = writeln!(text, "moves into: {} ({}), {}", to.mesh, to.trust_domain, hosts(to.members));
        let _ = writeln!(text, "{} may come, for {}.", hosts(moving.invited), ago(moving.ends_seconds));
        if to.trust_domain != from.trust_domain {
            let _ = writeln!(text, "Their identities will be of trust domain {}.", to.trust_domain);
        }
    }
    for renamed in &moving.renamed {
        let _ = writeln!(text, "{} will be called {}.", plain(&renamed.name), renamed.becomes);
    }
    for name in &moving.banished {
        let _ = writeln!(text, "{} is banished there and stays outside.", plain(name));
    }
    text.push_str("The authorities, roots, tokens and recovery key of this mesh end. Move?");
    text
}

fn text(moving: &Moving) -> String {
    match &moving.to {
        Some(to) => format!(
            "the hosts of this mesh move into mesh {}; `meshd status` on a host tells where it is, and hosts that are off follow within {}\n",
            to.mesh,
            ago(moving.ends_seconds)
        ),
        None => "hosts that have not moved yet stay in this mesh\n".into(),
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::{MeshId, NodeId, TrustDomain};

    use super::*;
    use crate::api::{MeshSide, Renamed};

    #[test]
    fn the_question_names_both_meshes_and_everything_that_changes() {
        let side = |n: u8, members| {
            let mesh = MeshId::from_bytes([n; 10]);
            MeshSide { mesh, founder: NodeId::from_bytes([n; 16]), trust_domain: TrustDomain::of(mesh), members }
        };
        let renamed = vec![Renamed { name: "pi".into(), becomes: "pi-abcd".parse().unwrap() }];
        let (from, to) = (side(1, 3), Some(side(2, 1)));
        let mut moving =
            Moving { from, to, invited: 2, banished: vec!["bad\x1b".into()], renamed, ends_seconds: 30 * 86_400, unsigned: None };
        let asked = question(&moving);
        for part in
            ["3 hosts", "1 host", "2 hosts may come, for 30", "pi will be called pi-abcd", "is banished there", "trust domain m"]
        {
            assert!(asked.contains(part), "{part} is not in {asked}");
        }
        assert!(!asked.contains('\x1b') && asked.contains(&moving.from.mesh.to_string()));
        // Of one fleet both have one name.
        moving.to = Some(MeshSide { members: 9, ..moving.from.clone() });
        assert!(!question(&moving).contains("Their identities"));
        assert!(text(&moving).contains("move into mesh"));
        assert!(text(&Moving { to: None, ..moving }).contains("stay in this mesh"));
    }
}
