//! What `tcpdump` shows of requests while the kernel program takes them out, as the page and the
//! doctor say.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::lab::BRIDGE;
use fence_lab::process::Process;
use fence_lab::server::Config;
use fence_lab::tools;
use nix::sys::signal::Signal;

use super::LIMIT;
use crate::bench::Bench;

/// The guest's port of the bridge.
const PORT: &str = "vnet1";

/// Whether a capture on each of these interfaces shows a request that is answered.
fn shown<const N: usize>(bench: &Bench, config: &Config, interfaces: [&str; N]) -> Result<[bool; N]> {
    let space = bench.hypervisor.space();
    let server = bench.serve(config)?;
    let mut captures = Vec::new();
    for interface in interfaces {
        // The page's command, but each packet is printed at once.
        let mut command = Command::new("tcpdump");
        let capture =
            Process::start(space, command.args(["-l", "--immediate-mode", "-ni", interface, "port", "1229"]))?;
        let begun = capture.stderr().wait_for(0, LIMIT, |line| line.contains("listening on").then_some(()));
        begun.with_context(|| format!("tcpdump does not begin: {}", capture.stderr().text()))?;
        captures.push(capture);
    }
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    let mut shown = [false; N];
    for (mut capture, shown) in captures.into_iter().zip(&mut shown) {
        // The callback comes after the request, and no program takes it out: with it the capture
        // has seen both.
        let called_back = capture.stdout().wait_for(0, LIMIT, |line| line.contains("Flags [").then_some(()));
        called_back.with_context(|| format!("no callback in the capture: {}", capture.stdout().text()))?;
        capture.signal(Signal::SIGINT)?;
        let printed = capture.finish(LIMIT)?;
        *shown = printed.stdout.contains("225.0.0.12.1229: UDP, length 176");
    }
    Ok(shown)
}

#[test]
fn a_capture_shows_requests_where_the_page_says() -> Result<()> {
    tools::require(&["tcpdump"])?;
    let bench = Bench::new()?;
    for (attach, on_bridge) in [("off", true), ("tcx", true), ("generic", false)] {
        let seen = shown(&bench, &bench.config(attach), [BRIDGE, PORT])?;
        ensure!(seen == [on_bridge, true], "attach={attach}: {BRIDGE} and {PORT}: {seen:?}");
    }
    // Without a bridge, on a driver with native XDP.
    let bench = Bench::new()?;
    bench.hypervisor.delete_bridge()?;
    bench.hypervisor.ip(&["addr", "add", "192.168.122.1/24", "dev", PORT])?;
    bench.hypervisor.ip(&["link", "set", PORT, "up"])?;
    let config = Config { interface: PORT.to_owned(), ..bench.config("native") };
    let seen = shown(&bench, &config, [PORT])?;
    ensure!(seen == [false], "attach=native: {seen:?}");
    Ok(())
}
