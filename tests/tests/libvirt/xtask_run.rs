//! `cargo xtask run` on a hypervisor: which files it uses, makes and reports, and that the daemon
//! then serves.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::client::Client;
use fence_lab::kernel::program_on;
use fence_lab::lab::{BRIDGE, Guest, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::{Finished, Process};
use fence_lab::qemu;
use fence_lab::server::{Config, START_LIMIT, STOP_LIMIT, Server, Which};
use fence_lab::tools;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::KEY;

/// The directory for xtask's own configuration and key, by `XDG_STATE_HOME`.
const STATE: &str = "/run/lab/state";
/// The daemon's PID file, at stock's path in the lab's own /run.
const PID_FILE: &str = "/run/fence_virtd.pid";

/// Runs a command with its own /etc: `$1`, if not empty, is its fence_virt.conf, otherwise it has
/// none. The host's /etc stays unchanged.
const WITH_ETC: &str = r#"
set -eu
layers=$(mktemp -d -p /run/lab)
mkdir "$layers/upper" "$layers/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$layers/upper,workdir=$layers/work" overlay /etc
rm -f /etc/fence_virt.conf
if [ -n "$1" ]; then cp "$1" /etc/fence_virt.conf; fi
shift
exec "$@"
"#;

/// The path of the xtask that runs these tests.
fn xtask() -> Result<String> {
    let path = tools::target_directory().join("debug/xtask");
    if !path.is_file() {
        bail!("no xtask at {}: run `cargo xtask test libvirt`", path.display());
    }
    Ok(path.to_string_lossy().into_owned())
}

/// Starts `cargo xtask run` on the lab's hypervisor with the existing build.
fn start(hypervisor: &Hypervisor, config: Option<&str>) -> Result<Process> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", WITH_ETC, "sh", config.unwrap_or_default(), &xtask()?]);
    command.args(["run", "--no-build", "--debug"]).env("XDG_STATE_HOME", STATE);
    Process::start(hypervisor.space(), &mut command)
}

/// Like [`start`], and waits until the daemon serves.
fn serve(hypervisor: &Hypervisor, config: Option<&str>) -> Result<Process> {
    let process = start(hypervisor, config)?;
    let ready = |line: &str| line.split_whitespace().any(|word| word == "ready").then_some(());
    let served = process.stderr().wait_for(0, START_LIMIT, ready);
    served.with_context(|| format!("it does not serve: {}", process.stderr().text()))?;
    Ok(process)
}

/// Ctrl-C: checks exit status 0, no program on the bridge, no PID file.
fn interrupt(hypervisor: &Hypervisor, mut process: Process) -> Result<Finished> {
    process.signal(Signal::SIGINT)?;
    let ended = process.finish(STOP_LIMIT)?;
    ensure!(ended.code == Some(0), "exit code {:?}: {}", ended.code, ended.stderr);
    ensure!(program_on(hypervisor, BRIDGE)?.is_none(), "the program is still attached");
    ensure!(!hypervisor.outside(PID_FILE).exists(), "the PID file is still there");
    Ok(ended)
}

fn says(process: &Process, part: &str) -> Result<()> {
    let said = process.stderr().text();
    ensure!(said.contains(part), "it does not say `{part}`: {said}");
    Ok(())
}

fn mode(path: &Path) -> Result<u32> {
    let metadata = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok(metadata.permissions().mode() & 0o7777)
}

fn expect(guest: &Guest, client: &Client, code: i32, process: &Process) -> Result<Finished> {
    let answer = client.run(guest.space())?;
    let shown = client.arguments().join(" ");
    ensure!(answer.code == Some(code), "fence_xvm {shown}: {answer:?}\n{}", process.stderr().text());
    Ok(answer)
}

#[test]
fn xtask_run_on_a_hypervisor_serves_with_what_is_there_or_makes_it() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let guest = hypervisor.guest(1)?;
    for name in ["node1", "node2"] {
        qemu::start_idle(&libvirtd, name)?;
    }

    // Without any files: it makes a secret key and a configuration, and says how the guests get the
    // key.
    let run = serve(&hypervisor, None)?;
    let key = format!("{STATE}/fence-xdp/fence_xvm.key");
    says(&run, "this machine is a hypervisor")?;
    says(&run, &format!("using {STATE}/fence-xdp/fence_virt.conf"))?;
    let told = run.stdout().text();
    ensure!(told.contains(&format!("scp -p {key} root@GUEST:/etc/cluster/fence_xvm.key")), "{told}");
    for (path, expected) in [("", 0o700), ("fence_xvm.key", 0o600), ("fence_virt.conf", 0o600)] {
        let path = hypervisor.outside(&format!("{STATE}/fence-xdp/{path}"));
        ensure!(mode(&path)? == expected, "{}: mode {:o}", path.display(), mode(&path)?);
    }
    let made = std::fs::read(hypervisor.outside(&key))?;
    let list = expect(&guest, &Client::new("list", &key), 0, &run)?;
    ensure!(["node1", "node2"].iter().all(|name| list.stdout.contains(name)), "{}", list.stdout);
    let machine = Witness::of_qemu(&hypervisor, "node2")?;
    expect(&guest, &Client::new("off", &key).domain("node2"), 0, &run)?;
    ensure!(machine.is_dead()?, "the client got a success and QEMU still lives");
    expect(&guest, &Client::new("on", &key).domain("node2"), 0, &run)?;
    libvirtd.wait_state(qemu::URI, "node2", "running")?;
    interrupt(&hypervisor, run)?;

    // The second run uses the same key, which the guests have copied.
    let run = serve(&hypervisor, None)?;
    says(&run, &format!("using {STATE}/fence-xdp/fence_virt.conf"))?;
    ensure!(std::fs::read(hypervisor.outside(&key))? == made, "another key");
    interrupt(&hypervisor, run)?;

    // With stock's configuration and key, it uses those.
    let stocks_key = hypervisor.write("stock.key", &KEY)?;
    let mut config = Config::new(&stocks_key);
    config.uris = vec![qemu::URI.to_owned()];
    let file = hypervisor.write("stock.conf", config.render().as_bytes())?;
    let run = serve(&hypervisor, Some(&file))?;
    says(&run, "using /etc/fence_virt.conf")?;
    expect(&guest, &Client::new("status", &stocks_key).domain("node2"), 0, &run)?;
    interrupt(&hypervisor, run)?;

    // While stock's server runs, it refuses to start.
    let _stock = Server::start(&hypervisor, &Which::Stock, &config)?;
    let ended = start(&hypervisor, Some(&file))?.finish(START_LIMIT)?;
    ensure!(ended.code == Some(1) && ended.stderr.contains("already running as pid"), "{ended:?}");
    Ok(())
}
