//! `meshd resolve`: who is expected at an address, before anything is connected.

use std::net::SocketAddr;

use clap::Args;

use super::screen::remark;
use super::{Around, Exit, Failure, Output};

const EXAMPLES: &str = "\
Prints the SPIFFE id that a connection from this host to the address would insist on. Exit status 1, with the reason on standard \
error, if the address is not a member's or the connection would not be secured.

Examples:
  meshd resolve 192.168.7.12:5432
  meshd resolve '[fd00::12]:443' -o json";

/// Tell which identity is expected at an address
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Resolve {
    /// Address and port, with brackets around an IPv6 address
    #[arg(value_name = "ADDR:PORT", value_parser = address)]
    address: SocketAddr,
    #[command(flatten)]
    output: Output,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an address and a port: 192.168.7.12:5432 or [fd00::12]:5432".into())
}

impl Resolve {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let answer = around.local()?.resolve(self.address).await?;
        let id = answer.id.as_ref().filter(|_| answer.secured);
        if screen.json {
            screen.show(&answer, String::new)?;
            return Ok(if id.is_some() { Exit::Ok } else { Exit::Failed });
        }
        let host = answer.host.as_ref().map(ToString::to_string);
        match id {
            Some(id) => {
                screen.print(&format!("{id}\n"))?;
                let host = host.map_or(String::new(), |host| format!("on {host}: "));
                remark(&format!("{host}{}", super::screen::plain(&answer.why)));
                Ok(Exit::Ok)
            }
            None => {
                let what = match (answer.secured, host) {
                    (true, Some(host)) => format!("no identity is known at {} on {host}", self.address),
                    (true, None) => format!("no identity is known at {}", self.address),
                    (false, _) => format!("a connection to {} is not secured", self.address),
                };
                Err(Failure::new(Exit::Failed, what).why(answer.why))
            }
        }
    }
}
