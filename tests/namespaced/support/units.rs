//! Processes in imitated units.

use std::path::Path;
use std::process::Command;

/// `command`, born inside `cgroup`: it has never been anywhere else when its first socket is made.
pub(crate) fn inside(cgroup: &Path, command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", r#"echo 0 > "$0/cgroup.procs" && exec "$@""#])
        .arg(cgroup)
        .arg(command.get_program())
        .args(command.get_args());
    shell
}
