//! `meshd token`: what lets a host in.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Subcommand};
use meshd_ca::merge::HOSTS;
use tokio::time::{Instant, sleep};

use super::screen::{ago, remark};
use super::table::Table;
use super::{Around, Exit, Failure, Output};
use crate::api::{self, Invited, NewToken, State, TokenInfo};
use crate::config::{DurationError, parse_duration};
use crate::local::Local;

const CREATE: &str = "\
Standard output has the token alone, on a line of its own; remarks go to standard error. Whoever has the token can join \
until it ends or is used up: treat it as a password. Only an authority makes tokens (`meshd nodes` shows which hosts are).

Examples:
  sudo meshd token create
  sudo meshd token create --lifetime 24h --uses 10
  sudo meshd token create | ssh pi-2 sudo meshd join -
  sudo meshd token create --hint 203.0.113.7:6374    # behind a forwarded port
  sudo meshd token create --merge                    # for a whole mesh, see `meshd merge`";
const LIST: &str = "\
Tokens that ended or are used up are not listed; one with which a mesh was invited (`meshd merge`) is, until its hosts cannot come any more: \
revoking it ends that. The secret part of a token is never shown again.

Examples:
  sudo meshd token list
  sudo meshd token list -o json";
const REVOKE: &str = "\
Hosts that joined with it stay members.

Examples:
  sudo meshd token revoke ID      # as `meshd token list` shows it";

/// Make, list and revoke the tokens that let hosts join
#[derive(Debug, Args)]
pub(super) struct Token {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a token with which another host can join
    #[command(after_help = CREATE)]
    Create(Create),
    /// List the tokens that are still good
    #[command(after_help = LIST)]
    List(List),
    /// End a token before its time
    #[command(after_help = REVOKE)]
    Revoke(Revoke),
}

#[derive(Debug, Args)]
struct Create {
    /// How long it is good for
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = lifetime)]
    lifetime: Duration,
    /// How many hosts may join with it [default: 1; with --merge 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    uses: Option<u32>,
    /// Let a whole mesh move into this one: `meshd merge` there takes the token
    #[arg(long)]
    merge: bool,
    /// Where the new host finds this one [default: this host's own addresses]
    #[arg(long = "hint", value_name = "ADDR:PORT")]
    hints: Vec<SocketAddr>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Revoke {
    /// Which, as `meshd token list` shows it
    #[arg(value_parser = id)]
    id: String,
    #[command(flatten)]
    output: Output,
}

/// How long a daemon that has just been started may look for a mesh until a token is asked of it all the same, and how often it is asked
/// whether it still does.
const STARTING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(100));

/// Longest life of a token: a year.
const MAX_LIFETIME: Duration = Duration::from_secs(366 * 86_400);

fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = parse_duration(text).map_err(|e: DurationError| e.to_string())?;
    match lifetime.as_secs() {
        1.. if lifetime <= MAX_LIFETIME => Ok(lifetime),
        _ => Err("a token is good for 1s to 366d".into()),
    }
}

/// What may stand in the path of a request.
fn id(text: &str) -> Result<String, String> {
    match (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        true => Ok(text.to_owned()),
        false => Err("expected the id of a token, as `meshd token list` shows it".into()),
    }
}

impl Token {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        match self.verb {
            Verb::Create(Create { lifetime, uses, merge, hints, output }) => {
                until_decided(&local).await;
                let uses = uses.unwrap_or(if merge { HOSTS } else { 1 });
                let token = local.create_token(&NewToken { lifetime_seconds: lifetime.as_secs(), uses, hints, merge }).await?;
                let screen = around.screen(output);
                screen.show(&token, || format!("{}\n", super::screen::plain(token.token.expose())))?;
                if !screen.json {
                    let uses = if token.uses == 1 { "one host".into() } else { format!("{} hosts", token.uses) };
                    let time = ago(token.expires_seconds);
                    remark(&match merge {
                        false => format!("Good for {uses}, for {time}. On the host that is to join: sudo meshd join"),
                        true => format!("Good for a mesh of at most {uses}, for {time}. On a host of it: sudo meshd merge"),
                    });
                }
            }
            Verb::List(List { output }) => {
                let tokens = local.tokens().await?;
                let screen = around.screen(output);
                screen.show(&tokens, || list(&tokens).render(&screen, "no tokens"))?;
            }
            Verb::Revoke(Revoke { id, output }) => {
                let done = local.revoke_token(&id).await?;
                around.screen(output).show(&done, || format!("revoked {id}\n"))?;
            }
        }
        Ok(Exit::Ok)
    }
}

/// Waits while the daemon has not found out yet whether it is to found a mesh: the first token is asked for right after the first start.
async fn until_decided(local: &Local) {
    let (patience, pause) = STARTING;
    let end = Instant::now() + patience;
    while local.status().await.is_ok_and(|status| status.state == State::New) && Instant::now() < end {
        sleep(pause).await;
    }
}

fn list(tokens: &[api::TokenInfo]) -> Table {
    let merges = tokens.iter().any(|t| t.merge.is_some());
    let mut table =
        Table::new(if merges { &["ID", ">USES LEFT", ">ENDS IN", "MESH"] } else { &["ID", ">USES LEFT", ">ENDS IN"] });
    for TokenInfo { id, uses_left, expires_seconds, merge } in tokens {
        let what = merge.as_ref().map_or_else(String::new, |Invited { mesh, hosts, arrived }| match mesh {
            Some(mesh) => format!("{mesh}: {arrived} of {hosts} have come"),
            None => format!("for a mesh of at most {hosts}"),
        });
        let (id, left, ends) = (id.into(), uses_left.into(), ago(*expires_seconds).into());
        match merges {
            true => table.row([id, left, ends, what.into()]),
            false => table.row([id, left, ends]),
        }
    }
    table
}
