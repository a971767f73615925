//! `meshd recover` and `meshd unbanish`: what the recovery key says to the mesh, about authorities, the banished and the clock.
//!
//! The key is used here and never given to the daemon: this command reads the roster, signs, and hands the signed entries in.

use std::path::{Path, PathBuf};

use clap::Args;
use meshd_ca::clock::{AGREEMENT, Reset};
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::{Entry, Roster, RosterError, Standing};
use meshd_ca::time::UnixTime;
use serde::Serialize;

use super::{Around, Exit, Failure, Output, recovery_key, terminal};
use crate::api::{ClockWord, MAX_REQUEST, RecoveryWords};
use crate::clock::Clock;
use crate::daemon::AHEAD;
use crate::local::Local;

const UNBANISH: &str = "\
Takes back that a host was banished, by whomever. It is a member again, but no authority. If it has heard that it was banished, it left its mesh: give \
it a token (`meshd join TOKEN` there). To be run on any member, with the recovery key of the mesh, which is asked for. What the host had signed counts \
again, also whom it had put out, or a thief with its key: they are named, and it is asked whether that is meant.

Examples:
  sudo meshd unbanish cellar
  sudo meshd unbanish --recovery-key-file /mnt/usb/recovery-key.txt cellar";
const RECOVER: &str = "\
For a mesh whose authorities are all gone, so that nobody can renew or join; to be run on any member, with the recovery key of the mesh, which \
is asked for. This host becomes an authority with a new root. Authorities that are not heard now lose their office; they stay members, and \
certificates they signed stay valid (`meshd banish` puts one out that was stolen). It signs as soon as the members that are there know its root, a minute at most after the others fell silent. \
Where this host is an authority already it stays one, and only the founder and the recovery key put it out from then on.

With --clock it does nothing of that: it sets the clock of the mesh back to what the clock of this host shows, for a mesh, or an authority, that followed \
clocks that were ahead and would be alone with that until the time has come. Set the clocks right first, and run it on a host that is ahead (`meshd check` \
there says so). Authorities may be there or not. Every member in reach obeys at once, the others when they are back; join tokens of before end.

Examples:
  sudo meshd recover
  sudo meshd recover --clock
  sudo meshd recover --yes --recovery-key-file /mnt/usb/recovery-key.txt";

/// Where the recovery key comes from, if not from the terminal.
#[derive(Debug, Args)]
pub(super) struct KeyFile {
    /// Read the recovery key of the mesh from a file instead of asking for it
    #[arg(long, value_name = "FILE")]
    recovery_key_file: Option<PathBuf>,
}

impl KeyFile {
    pub(super) fn path(&self) -> Option<&Path> {
        self.recovery_key_file.as_deref()
    }
}

/// Take back that a host was put out of the mesh
#[derive(Debug, Args)]
#[command(after_help = UNBANISH)]
pub(super) struct Unbanish {
    /// The name or id of the host, as `meshd nodes` shows it
    #[arg(value_name = "NODE", value_parser = super::member)]
    node: String,
    #[command(flatten)]
    key: KeyFile,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

/// Make this host an authority when all are gone, or set the clock of the mesh back
#[derive(Debug, Args)]
#[command(after_help = RECOVER)]
pub(super) struct Recover {
    #[command(flatten)]
    key: KeyFile,
    /// Set the clock of the mesh back to this host's, and nothing else
    #[arg(long)]
    clock: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

/// What `unbanish` shows with `-o json`.
#[derive(Debug, Serialize)]
struct TakenBack {
    /// The hosts that are out with that.
    out: Vec<String>,
}

/// What `recover --clock` shows with `-o json`.
#[derive(Debug, Serialize)]
struct SetBack {
    /// Mesh time before, in seconds since 1970.
    from: u64,
    /// And now.
    to: u64,
}

/// What `recover` shows with `-o json`.
#[derive(Debug, Serialize)]
struct Recovered {
    /// The authorities that lost their office.
    removed: Vec<String>,
}

fn failed(what: &'static str) -> impl Fn(RosterError) -> Failure {
    move |error| Failure::new(Exit::Failed, what).why(error.to_string())
}

/// Hands in what was signed, in the order in which the others are to hear it.
async fn hand_in(local: &Local, words: Vec<Entry>) -> Result<(), Failure> {
    let mut entries = Vec::new();
    let mut size = 0;
    for word in words {
        let more = word.to_bytes().len() + 1;
        if size + more > MAX_REQUEST / 2 {
            local.recovered(&RecoveryWords { entries: std::mem::take(&mut entries) }).await?;
            size = 0;
        }
        size += more;
        entries.push(word);
    }
    local.recovered(&RecoveryWords { entries }).await?;
    Ok(())
}

/// Puts a node out by the recovery key.
///
/// # Errors
/// When there is no such node, the roster does not allow it, or the daemon does not take it.
pub(super) async fn banish(local: &Local, mut roster: Roster, key: &PrivateKey, node: &str) -> Result<(), Failure> {
    const WHAT: &str = "it is not banished";
    let node = roster.named(node).ok_or_else(|| failed(WHAT)(RosterError::NotMember))?.node();
    let mut words = roster.banish(key, node).map_err(failed(WHAT))?;
    // What was there before is nothing new.
    words.retain(|w| roster.is_recovery(w.member().by));
    let ban = words.pop();
    if !words.is_empty() {
        hand_in(local, words).await?;
        tokio::time::sleep(AHEAD).await;
    }
    hand_in(local, ban.into_iter().collect()).await
}

impl Unbanish {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        const WHAT: &str = "the banishment is not taken back";
        let local = around.local()?;
        let mut roster = local.roster().await?;
        let key = recovery_key::signing(&roster, self.key.path())?;
        // The names of those who were put out are free: there may be several.
        let named: Vec<_> =
            roster.members().filter(|m| m.name.as_str() == self.node && m.standing == Standing::Banished).collect();
        let node = match named[..] {
            [one] => one.node(),
            [] => roster.named(&self.node).ok_or_else(|| failed(WHAT)(RosterError::NotMember))?.node(),
            _ => {
                return Err(Failure::new(Exit::Failed, WHAT)
                    .why("several hosts had that name")
                    .remedy("give its id (`meshd nodes`)"));
            }
        };
        let before = roster.clone();
        let word = roster.unbanish(&key, node).map_err(failed(WHAT))?;
        let out = put_out(&before, &roster);
        if !out.is_empty() && !self.yes {
            let names = out.join(", ");
            terminal::confirm(&format!(
                "What {} had signed counts again: {names} would be out of the mesh. Take it back?",
                self.node
            ))?;
        }
        hand_in(&local, vec![word]).await?;
        let mut text = format!("{} is a member again; if it left its mesh, let it join: `meshd token create`\n", self.node);
        if !out.is_empty() {
            text += &format!(
                "out of the mesh with that: {}; `meshd unbanish` takes back whom you miss, or let it join\n",
                out.join(", ")
            );
        }
        around.screen(self.output).show(&TakenBack { out }, || text)?;
        Ok(Exit::Ok)
    }
}

/// The names of those who are members in one roster and not in a later one.
fn put_out(before: &Roster, after: &Roster) -> Vec<String> {
    before.active().filter(|m| !after.is_active(m.node())).map(|m| m.name.to_string()).collect()
}

impl Recover {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        if self.clock {
            return self.set_back(around).await;
        }
        const WHAT: &str = "this host is not made an authority";
        let local = around.local()?;
        let mut roster = local.roster().await?;
        let own = local.new_root().await?;
        let authorities = local.authorities().await?;
        let lost: Vec<_> = authorities.into_iter().filter(|a| !a.reachable && a.id != own.node).collect();
        let lost: Vec<_> = lost.into_iter().filter(|a| roster.member(a.id).is_some_and(|m| m.is_authority())).collect();
        let removed: Vec<String> = lost.iter().map(|a| a.name.to_string()).collect();
        // One that left, and came back where that was not heard, is one without the key of its root.
        let already = roster.member(own.node).is_some_and(|m| m.is_authority() && m.roots.contains(&own.root));
        if already && lost.is_empty() && roster.is_protected(own.node) && roster.recovery().is_some() {
            let text = "nothing is to be done: this host is an authority that only the founder and the recovery key put out, and the others are heard\n";
            around.screen(self.output).show(&Recovered { removed }, || text.into())?;
            return Ok(Exit::Ok);
        }
        if !self.yes {
            let mesh = UnixTime(local.mesh_time().await?.now);
            terminal::confirm(&question(already, &removed, mesh, Clock::system_time()))?;
        }
        let key = recovery_key::signing(&roster, self.key.path())?;
        // About the roots of an authority only its own word counts.
        let mut words = match already {
            true => roster.confirm(&key, own.node).map_err(failed(WHAT))?.into_iter().collect(),
            false => vec![roster.grant(&key, own.node, vec![own.root]).map_err(failed(WHAT))?],
        };
        for authority in &lost {
            words.push(roster.retire(&key, authority.id, true).map_err(failed(WHAT))?);
        }
        hand_in(&local, words).await?;
        let text = match already {
            true => "this host stays an authority, and only the founder and the recovery key put it out from now on\n",
            false => {
                "this host is an authority; it signs when everybody who is there believes its root (`meshd authority list`)\n"
            }
        };
        around.screen(self.output).show(&Recovered { removed }, || text.into())?;
        Ok(Exit::Ok)
    }

    async fn set_back(self, around: &Around<'_>) -> Result<Exit, Failure> {
        const WHAT: &str = "the clock of the mesh is not set back";
        let local = around.local()?;
        let (roster, time) = (local.roster().await?, local.mesh_time().await?);
        let (from, to) = (UnixTime(time.now), Clock::system_time());
        if to + AGREEMENT >= from {
            return Err(Failure::new(Exit::Failed, WHAT)
                .why(format!("it is not ahead here: mesh time is {from}, and the clock of this host shows {to}"))
                .remedy("set the clock of this host right, and run the command on a host that is ahead (`meshd check` there)"));
        }
        if !self.yes {
            terminal::confirm(&format!("Set the clock of the mesh back from {from} to {to}, for all its hosts?"))?;
        }
        let key = recovery_key::signing(&roster, self.key.path())?;
        let signed = Reset::sign(&key, roster.mesh(), time.era, to, UnixTime(time.beyond));
        let word = signed.map_err(|e| Failure::new(Exit::Failed, WHAT).why(e.to_string()))?;
        local.set_back(&ClockWord { reset: word.signed().clone() }).await?;
        let text = format!("the clock of the mesh is at {to} again; what was signed before for later counts for nothing\n");
        around.screen(self.output).show(&SetBack { from: from.0, to: to.0 }, || text)?;
        Ok(Exit::Ok)
    }
}

/// What is asked before this host becomes an authority in the place of these, or stays one, when mesh time is `mesh` and its clock shows `clock`.
fn question(already: bool, removed: &[String], mesh: UnixTime, clock: UnixTime) -> String {
    let without = match removed {
        [] => "beside those that are there".into(),
        _ => format!("instead of {}", removed.join(", ")),
    };
    let behind = match clock + AGREEMENT < mesh {
        true => format!(
            "The clock of this host shows {clock}, and the mesh was at {mesh} already: what it signs may be of the past for hosts that know better. \
             Set its clock first, or take a host whose clock is right.\n"
        ),
        false => String::new(),
    };
    let what = if already { "Stand behind this host, which is" } else { "Make this host" };
    format!("{behind}{what} an authority of the mesh, {without}?")
}

#[cfg(test)]
mod tests {
    use meshd_ca::identity::{HostName, MeshId, TrustDomain};
    use meshd_ca::issue::Issuer;
    use meshd_ca::recovery::{Recovery, RecoveryKey};

    use super::*;

    /// A thief with the founder's key put an authority out before it was put out itself: with the founder that ban is back, and whom only that authority
    /// had let in is unknown.
    #[test]
    fn it_is_known_who_is_out_with_one_that_is_taken_back() {
        let (now, mesh, paper) = (UnixTime(1_800_000_000), MeshId::from_bytes([5; 10]), RecoveryKey::generate().unwrap());
        let [f, a, b] = [(); 3].map(|()| PrivateKey::generate().unwrap());
        let id = |k: &PrivateKey| k.public().node_id();
        let name = |s: &str| s.parse::<HostName>().unwrap();
        let domain = TrustDomain::of(mesh);
        let root = |k: &PrivateKey| Issuer::create(&domain, id(k), now, AGREEMENT * 1000).unwrap().root_der().to_vec();
        let recovery = Recovery::new(&paper).unwrap();
        let signing = recovery.open(&paper).unwrap();
        let place = (mesh, domain.clone());
        let mut roster = Roster::found_with(Some(recovery), place, &f, name("f"), root(&f), now).unwrap();
        roster.admit(&f, a.public(), &name("a"), now).unwrap();
        roster.grant(&f, id(&a), vec![root(&a)]).unwrap();
        let mut thief = roster.clone();
        roster.admit(&a, b.public(), &name("b"), now).unwrap();
        roster.banish(&signing, id(&f)).unwrap();
        for word in thief.banish(&f, id(&a)).unwrap() {
            roster.merge(word).unwrap();
        }
        let before = roster.clone();
        assert!(put_out(&before, &roster).is_empty() && roster.is_active(id(&a)) && roster.is_active(id(&b)));
        roster.unbanish(&signing, id(&f)).unwrap();
        let mut out = put_out(&before, &roster);
        out.sort();
        assert_eq!(out, ["a", "b"]);
    }

    #[test]
    fn the_question_says_who_loses_the_office_and_whether_the_clock_is_behind() {
        let now = UnixTime(1_800_000_000);
        assert_eq!(question(false, &[], now, now), "Make this host an authority of the mesh, beside those that are there?");
        let stays = question(true, &["a".into()], now, now);
        assert_eq!(stays, "Stand behind this host, which is an authority of the mesh, instead of a?");
        let asked = question(false, &["a".into(), "b".into()], now, UnixTime(120));
        assert!(
            asked.starts_with("The clock of this host shows 1970-01-01T00:02:00Z, and the mesh was at 2027-01-15T08:00:00Z"),
            "{asked}"
        );
        assert!(asked.ends_with("\nMake this host an authority of the mesh, instead of a, b?"), "{asked}");
        assert!(!question(false, &[], now, now + AGREEMENT * 2).contains("clock"), "one that is ahead is not followed");
    }
}
