//! The few facts and wishes about processes that the standard library leaves to libc.
//!
//! Owns nothing; every function is one system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The user this process acts as.
pub fn effective_uid() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}

/// The group this process acts as.
pub fn effective_gid() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::getegid() }
}

/// The processor time that the threads of this process with this name (15 bytes of it, as the kernel keeps it) have taken so far; nothing
/// where `/proc` does not say.
pub fn cpu_time_of(thread: &str) -> Duration {
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|t| t.path());
    let named = tasks.filter(|t| std::fs::read_to_string(t.join("comm")).is_ok_and(|name| name.trim_end() == thread));
    let ticks: u64 = named.filter_map(|t| ticks(&std::fs::read_to_string(t.join("stat")).ok()?)).sum();
    Duration::from_millis(ticks.saturating_mul(1000) / ticks_per_second)
}

/// `utime` and `stime` in a line of proc_pid_stat(5). The name before them may have any character in it.
fn ticks(stat: &str) -> Option<u64> {
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(words.next()?.parse::<u64>().ok()?.saturating_add(words.next()?.parse().ok()?))
}

/// Asks a child to end (SIGTERM), as `systemctl stop` does.
///
/// # Errors
/// The system call's; a child that is already reaped is none of ours any more and must not be passed.
pub fn terminate(child: &Child) -> io::Result<()> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    // SAFETY: takes no pointers. The pid cannot have been reused: the child is not reaped while `child` is not waited for.
    match unsafe { libc::kill(pid, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the child be killed when the thread that starts it ends, so that an aborted demo or test leaves nothing behind.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        })
    }
}

/// Starts `command` as a process that is nobody's child here: the one before us in the tree (the service manager) becomes its parent, and is
/// told how it ends. It gets `line`, a descriptor of the same number; its process id is written to that first, four bytes in this
/// machine's order.
///
/// # Errors
/// When there are no processes left, or the program cannot be executed.
pub fn beget(command: &mut Command, line: BorrowedFd<'_>) -> io::Result<()> {
    let fd = line.as_raw_fd();
    // SAFETY: between fork and exec only fcntl(2), clone(2), getpid(2), write(2) and _exit(2) are called, directly: async-signal-safe, and nothing is
    // allocated. `line` is borrowed until the command has been spawned below, and the closure runs at no other time.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            // Not fork(3), whose handlers may take locks. The arguments behind the flags are all zero: their order differs between targets.
            match libc::syscall(
                libc::SYS_clone,
                libc::c_long::from(libc::SIGCHLD),
                0 as libc::c_long,
                0 as libc::c_long,
                0 as libc::c_long,
                0 as libc::c_long,
            ) {
                0 => {
                    // By the process itself: whatever it says later comes later.
                    let pid = libc::getpid().to_ne_bytes();
                    libc::write(fd, pid.as_ptr().cast(), pid.len());
                    Ok(())
                }
                child if child > 0 => libc::_exit(0),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    // The one in between, which has ended.
    command.spawn()?.wait().map(drop)
}

/// Raises the limit on open files to what the system allows this process, and returns it. Each proxied connection needs two.
///
/// # Errors
/// The system call's.
pub fn raise_file_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives through the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` lives through the call and is only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // 32 bits wide on some 32-bit targets.
    #[allow(clippy::useless_conversion)]
    Ok(u64::from(limit.rlim_cur))
}

/// Bytes of memory of this machine.
pub fn memory() -> u64 {
    let machine = rustix::system::sysinfo();
    (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit))
}

/// Keeps this process, which holds keys, out of core dumps: no core file, and none for a handler that the system pipes them to, which
/// does not look at the limit. Nobody but root can read its memory or descriptors then, not even its own user.
///
/// # Errors
/// The system call's.
pub fn forbid_dumps() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `none` lives through the call and is only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let no: libc::c_ulong = 0;
    // SAFETY: takes no pointers.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, no, no, no, no) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The limit on open files of this process.
pub fn file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives through the call. On failure it stays zero.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    // 32 bits wide on some 32-bit targets.
    #[allow(clippy::useless_conversion)]
    u64::from(limit.rlim_cur)
}

/// Time since the machine started, suspend included; does not go backwards and needs no clock battery.
pub fn since_boot() -> Duration {
    since(ClockId::Boottime)
}

/// The clock that service managers compare moments by (`CLOCK_MONOTONIC`); it stands still in suspend.
pub fn monotonic() -> Duration {
    since(ClockId::Monotonic)
}

/// Asked with 64 bits of seconds on every target: libc's own call has 32 on 32-bit Arm.
fn since(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Whether somebody keeps the system clock in step with others, as the kernel was told (`STA_UNSYNC` of adjtimex(2)); `None` when a
/// sandbox forbids to ask.
pub fn clock_is_synchronised() -> Option<bool> {
    // SAFETY: timex consists of integers, for which all zeroes is a value: the one that changes nothing.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `asked` lives through the call, which writes no more than its own type.
    match unsafe { libc::adjtimex(&raw mut asked) } {
        state if state < 0 => None,
        state => Some(state != libc::TIME_ERROR && asked.status & libc::STA_UNSYNC == 0),
    }
}

/// Becomes the owner of a descriptor that whoever started this process passed to it (`LISTEN_FDS`). Descriptors are taken in ascending
/// order and once: none for one that is not above those taken before, or is not open.
pub fn inherited(fd: RawFd) -> Option<OwnedFd> {
    static TAKEN: AtomicI32 = AtomicI32::new(2);
    if TAKEN.fetch_max(fd, Ordering::Relaxed) >= fd {
        return None;
    }
    // SAFETY: takes no pointers; a number that is no descriptor is an error.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and nobody else owns it: it was there before this process opened anything, so nothing in it has this number,
    // and it is handed out once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_time_goes_on_and_limits_rise() {
        let before = since_boot();
        assert!(before > Duration::ZERO);
        assert!(since_boot() >= before);
        assert!(monotonic() > Duration::ZERO && monotonic() <= since_boot());
        assert!(raise_file_limit().unwrap() >= 256);
    }

    #[test]
    fn nothing_of_this_process_is_dumped() {
        forbid_dumps().unwrap();
        // SAFETY: takes no pointers.
        assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
        assert!(core.split_whitespace().skip(4).take(2).eq(["0", "0"]), "{core}");
    }

    #[test]
    fn nothing_is_inherited_twice_or_unopened() {
        assert!(inherited(0).is_none(), "standard input is not handed over");
        assert!(inherited(1 << 20).is_none(), "not open");
        assert!(inherited(3).is_none(), "below one that was asked for before");
    }

    #[test]
    fn what_is_begot_is_nobodys_child_and_has_the_line() {
        use std::os::fd::AsFd;
        use std::os::unix::net::UnixStream;
        let (mut here, there) = UnixStream::pair().unwrap();
        let line = format!("/proc/self/fd/{}", there.as_raw_fd());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "test -S \"$0\" && echo $$ $PPID", &line]).stdout(OwnedFd::from(there.try_clone().unwrap()));
        beget(&mut command, there.as_fd()).unwrap();
        // Its standard output is this end, too.
        drop(command);
        drop(there);
        let mut said = Vec::new();
        std::io::Read::read_to_end(&mut here, &mut said).unwrap();
        let (pid, words) = said.split_first_chunk::<4>().unwrap();
        let words: Vec<i32> = std::str::from_utf8(words).unwrap().split_whitespace().map(|w| w.parse().unwrap()).collect();
        assert_eq!(words[0], i32::from_ne_bytes(*pid));
        assert_ne!(words[1], i32::try_from(std::process::id()).unwrap(), "our child");
        let (_here, there) = UnixStream::pair().unwrap();
        let none = beget(&mut Command::new("/nonexistent/meshd"), there.as_fd()).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_child_can_be_asked_to_end() {
        let mut child = die_with_parent(Command::new("sleep").arg("60")).spawn().unwrap();
        terminate(&child).unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn the_time_of_a_thread() {
        assert_eq!(ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 120 30 0 0 20"), Some(150));
        assert_eq!(ticks("7 (a) S 1"), None);
        let busy = std::thread::Builder::new().name("a-busy-thread".into()).spawn(|| {
            let mut n = 0u64;
            while cpu_time_of("a-busy-thread") < Duration::from_millis(50) {
                n = std::hint::black_box(n + 1);
            }
        });
        busy.unwrap().join().unwrap();
        assert_eq!(cpu_time_of("no-such-thread"), Duration::ZERO);
    }
}
