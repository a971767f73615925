//! `meshd join`: into the mesh a token is for, whether the daemon runs or not.

use std::path::PathBuf;

use clap::Args;
use zeroize::Zeroizing;

use super::{Around, Exit, Failure, Output, secret, terminal};
use crate::api::{JoinRequest, Secret};
use crate::config::Key;
use crate::local::{Local, LocalError};

const EXAMPLES: &str = "\
Make the token on an authority of the mesh: `sudo meshd token create`. Joining the mesh this host is in already is not an \
error. While no daemon runs, this command joins by itself, and `meshd run` then starts as a member. \
A token given as an argument can be read by other users in the list of processes while this runs, and stays in the shell's \
history: the prompt, standard input and a file do not show it.

Examples:
  sudo meshd join                        # asks for the token
  sudo meshd join TOKEN
  sudo meshd join --token-file /boot/firmware/meshd.token
  ssh pi-1 sudo meshd token create | sudo meshd join -";

/// Join the mesh that a token is for
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Join {
    /// The token; `-` reads it from standard input; asked for if missing
    #[arg(value_name = "TOKEN", value_parser = secret::argument, conflicts_with = "token_file")]
    token: Option<Secret>,
    /// Read the token from a file
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The name this host wishes for in the mesh, if the daemon does not run yet [default: its own]
    #[arg(long, value_name = "NAME")]
    host_name: Option<String>,
    #[command(flatten)]
    output: Output,
}

impl Join {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let name = Key::named("host_name").zip(self.host_name);
        let config = around.config(name.into_iter().collect())?;
        let token = given(self.token, self.token_file)?;
        let request = JoinRequest { token: token.to_string().into() };
        let joined = match Local::new(config.socket()).join(&request).await {
            Err(LocalError::NotRunning { .. }) => crate::daemon::join_offline(&config, &token).await?,
            other => other?,
        };
        around.screen(self.output).show(&joined, || match joined.already {
            true => format!("this host is a member of mesh {} already, as {}\n", joined.mesh, joined.name),
            false => format!("joined mesh {} as {}\n", joined.mesh, joined.name),
        })?;
        Ok(Exit::Ok)
    }
}

/// The token that a person gave as an argument, on standard input, in a file, or gives when asked.
pub(super) fn given(token: Option<Secret>, file: Option<PathBuf>) -> Result<Zeroizing<String>, Failure> {
    let text = match (token, file) {
        (Some(token), _) if token.expose() == "-" => secret::read(&mut std::io::stdin().lock(), "the token from standard input")?,
        (Some(token), _) => Zeroizing::new(token.expose().to_owned()),
        (None, Some(path)) => secret::in_file(&path, "the token")?,
        (None, None) if terminal::somebody_is_there() => terminal::secret("Token: ")?,
        (None, None) => {
            return Err(Failure::new(Exit::Usage, "no token")
                .why("none was given, and there is no terminal to ask for it")
                .remedy("give it as an argument, in --token-file FILE, or as - on standard input"));
        }
    };
    word(&text)
}

/// The one word in `text`. What it says is never repeated: it is a secret, or a mistake for one.
fn word(text: &str) -> Result<Zeroizing<String>, Failure> {
    let mut words = text.split_whitespace();
    let why = match (words.next(), words.next()) {
        (Some(word), None) if word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) => {
            return Ok(Zeroizing::new(word.to_owned()));
        }
        (None, _) => "there is nothing",
        (Some(_), Some(_)) => "it has more than one word",
        (Some(_), None) => "it has characters that no token has",
    };
    Err(Failure::new(Exit::Usage, "that is not a token").why(why).remedy("copy the whole word that `meshd token create` printed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_and_never_repeated() {
        assert_eq!(word(" abc-123\n").unwrap().as_str(), "abc-123");
        for bad in ["", " \n", "s3cret s3cret", "s3cret\x1b[2J", "s3crét"] {
            let failure = word(bad).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(!failure.to_string().contains("s3cr"), "{failure}");
        }
    }
}
