//! The lab itself: labs are isolated from each other, and leave nothing behind, however the owner
//! ends.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::process::poll_until;

/// Set for a copy of this test program that makes a lab and is killed.
const VICTIM: &str = "FENCE_LAB_VICTIM";
const LIMIT: Duration = Duration::from_secs(30);

/// A lab's cgroups in every hierarchy.
fn cgroups(name: &str) -> Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mounted = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        kind.starts_with("cgroup").then(|| Path::new(at).join(name))
    });
    Ok(mounted.filter(|path| path.exists()).collect())
}

fn wait_gone(name: &str, holder: u32) -> Result<()> {
    poll_until("the lab to be gone", LIMIT, || {
        let process = Path::new(&format!("/proc/{holder}")).exists();
        Ok((!process && cgroups(name)?.is_empty()).then_some(()))
    })
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    let lab = Hypervisor::new()?;
    let guest = lab.guest(1)?;
    let (name, holder) = (lab.name().to_owned(), lab.holder());
    ensure!(!cgroups(&name)?.is_empty(), "a lab has cgroups");
    guest.space().must("ping", &["-c", "1", "-W", "5", "192.168.122.1"]).or_else(|error| {
        // Not every machine has ping, so a file shows that the lab works.
        if error.to_string().contains("ping") { lab.space().must("ls", &["/run/lab"]) } else { Err(error) }
    })?;
    drop(guest);
    drop(lab);
    wait_gone(&name, holder)
}

#[test]
fn a_panicking_owner_leaves_nothing() -> Result<()> {
    let lab = Hypervisor::new()?;
    let (name, holder) = (lab.name().to_owned(), lab.holder());
    let panicked = std::thread::spawn(move || {
        let _lab = lab;
        panic!("as a failing test does");
    });
    ensure!(panicked.join().is_err());
    wait_gone(&name, holder)
}

#[test]
fn a_killed_owner_leaves_nothing() -> Result<()> {
    if std::env::var_os(VICTIM).is_some() {
        let lab = Hypervisor::new()?;
        let _daemonised = lab.space().must("sh", &["-c", "sleep 1000 >/dev/null 2>&1 &"])?;
        println_line(&format!("lab {} {}", lab.name(), lab.holder()))?;
        std::thread::sleep(Duration::from_secs(600));
        return Ok(());
    }
    let mut owner = Command::new(std::env::current_exe()?)
        .args(["--exact", "lab::a_killed_owner_leaves_nothing", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(owner.stdout.take().context("no pipe")?).lines();
    let said = lines.find_map(|line| Some(line.ok()?.split_once("lab fence-")?.1.to_owned())).context("no lab")?;
    let (name, holder) = said.split_once(' ').context("no number")?;
    let (name, holder) = (format!("fence-{name}"), holder.trim().parse()?);
    ensure!(!cgroups(&name)?.is_empty());
    // After SIGKILL none of the owner's code runs.
    owner.kill()?;
    owner.wait()?;
    wait_gone(&name, holder)
}

fn println_line(line: &str) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}").context("standard output")
}

#[test]
fn two_labs_do_not_meet() -> Result<()> {
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    first.write("/run/only-here", b"x")?;
    ensure!(first.outside("/run/only-here").exists());
    ensure!(!second.outside("/run/only-here").exists());
    ensure!(!Path::new("/run/only-here").exists());
    // Both labs have the same names and addresses, and the host has neither.
    ensure!(first.guest(1)?.v4 == second.guest(1)?.v4);
    ensure!(nix::net::if_::if_nametoindex("vnet1").is_err());
    Ok(())
}
