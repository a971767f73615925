//! A process after an upgrade: it has connections, and nothing else.
//!
//! Owns its end: when the last connection has ended, after `upgrade_drain`, or when it is told to stop. It writes nothing, accepts nothing and
//! is nobody in the mesh. Invariant: whom the mesh puts out loses its connections here too. The next process says so; if that one is dead, the
//! roster on disk does.

use std::sync::Arc;
use std::time::Duration;

use meshd_ca::roster::Roster;
use meshd_ca::store::Store;
use tokio::time::{Instant, sleep};

use super::Stop;
use super::before::{self, Kept};
use crate::config::Config;
use crate::membership::ROSTER;
use crate::proxy::live::Cut;
use crate::succession::{Line, Word};
use crate::task::{self, Tasks};

/// How often it looks whether it is over. Not at once: what was accepted a moment ago is not a connection yet.
const LOOK: Duration = Duration::from_secs(1);

/// Why it ends.
enum Why {
    Over,
    Late,
    Stopped,
}

/// Lives until the connections in `kept` have ended. `line` leads to the process that serves now.
pub(super) async fn stay(kept: Vec<Kept>, line: Line, stop: &mut Stop, store: &Arc<Store>, config: &Config) {
    let until = Instant::now() + config.upgrade_drain;
    let open = || kept.iter().map(|k| k.proxy.live.count()).sum::<usize>();
    let mut line = Some(line);
    let mut told = None;
    let mut seen = None;
    let mut looks = Tasks::new();
    kept.iter().for_each(|k| looks.spawn(k.proxy.clone().look_after()));
    let why = loop {
        tokio::select! {
            () = sleep(LOOK) => {
                if kept.iter().all(Kept::is_over) {
                    break Why::Over;
                }
                if Instant::now() >= until {
                    break Why::Late;
                }
                let now = u32::try_from(open()).unwrap_or(u32::MAX);
                match &line {
                    Some(line) if told != Some(now) => {
                        let word = Word::Open { connections: now };
                        // In the next look, when it does not listen at the moment.
                        if tokio::time::timeout(LOOK, line.say(&word, &[])).await.is_ok() {
                            told = Some(now);
                        }
                    }
                    Some(_) => {}
                    None => obey(&kept, store, &mut seen).await,
                }
            }
            _ = stop.asked() => break Why::Stopped,
            heard = hear(line.as_ref()) => match heard {
                Some(Word::Gone { nodes }) => {
                    let why = |banished| if banished { Cut::Banished } else { Cut::Left };
                    kept.iter().for_each(|k| before::cut(&k.proxy, nodes.iter().map(|(node, banished)| (*node, why(*banished)))));
                }
                Some(Word::Stop) => break Why::Stopped,
                Some(_) => {}
                None => {
                    tracing::warn!(open = open(), "the process that serves is gone: the connections of this one go on");
                    line = None;
                }
            },
        }
    };
    let patience = if matches!(why, Why::Stopped) { config.drain } else { Duration::ZERO };
    let ends = kept.iter().map(|k| k.proxy.drain(patience));
    let mut cut = 0;
    // One after the other: there is more than one only after an upgrade that failed late.
    for end in ends {
        cut += end.await;
    }
    if cut > 0 {
        tracing::warn!(cut, "connections of before an upgrade did not end in time and were reset");
    }
}

async fn hear(line: Option<&Line>) -> Option<Word> {
    match line {
        Some(line) => line.hear().await.map(|(word, _)| word),
        None => std::future::pending().await,
    }
}

/// Reads the roster, if it is another one than was `seen`, and ends the connections with those who are no members.
async fn obey(kept: &[Kept], store: &Arc<Store>, seen: &mut Option<[u8; 32]>) {
    let store = store.clone();
    let Ok(read) = task::blocking(move || store.load(ROSTER)).await else { return };
    let roster = match read {
        Ok(Some(saved)) => {
            let digest = meshd_ca::keys::sha256(&[&saved.bytes]);
            if seen.replace(digest) == Some(digest) {
                return;
            }
            Roster::from_bytes(&saved.bytes).map_err(|e| e.to_string())
        }
        // It left its mesh.
        Ok(None) => return kept.iter().for_each(|k| _ = k.proxy.live.cut_all(Cut::Left)),
        Err(error) => Err(error.to_string()),
    };
    match roster {
        Ok(roster) => kept.iter().for_each(|k| before::cut(&k.proxy, before::inactive(&roster))),
        Err(error) => tracing::warn!(%error, "the roster cannot be read: who was banished since stays connected here"),
    }
}
