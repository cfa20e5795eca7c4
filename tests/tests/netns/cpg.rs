//! The cluster backend on a host without corosync: what runs here is served, and nothing else is
//! said.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::server::Config;

use crate::bench::{Bench, DOMAIN};

/// How long an event that must come may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(60);

#[test]
fn without_corosync_only_what_ran_here_and_died_is_off() -> Result<()> {
    let bench = Bench::new()?;
    let backend = vec![("unfenced_hosts", "fail")];
    let config = Config { backend_name: "cpg", backend, ..bench.config("off") };
    let server = bench.serve(&config)?;
    let says = |line: &str| line.contains("WARN").then_some(()).filter(|()| line.contains("corosync"));
    server.wait_log(0, SURELY, says).with_context(|| format!("no word about corosync: {}", server.log()))?;
    let report = server.status()?.1;
    let cluster = &report["cluster"];
    ensure!(cluster["joined"] == false && cluster["quorate"] == false, "{cluster:#}");
    let problem = report["problems"].to_string();
    ensure!(problem.contains("corosync"), "{problem}");
    let space = bench.guest.space();
    let about = |op: &str, code: i32| bench.expect(&server, space, &bench.about_domain(op), code);
    // What runs here is known, and its death is proven.
    about("status", 0)?;
    about("on", 0)?;
    about("off", 0)?;
    server.wait_domain(DOMAIN, "shut off")?;
    // From here on it may run on another host.
    for op in ["off", "reboot", "status", "on"] {
        let position = server.log_position();
        about(op, 1)?;
        let why = |line: &str| line.contains(&format!("op={op} ")).then(|| line.contains("other hosts"));
        let told = server.wait_log(position, SURELY, why).with_context(|| server.log())?;
        ensure!(told, "{op}: the log does not say why: {}", server.log());
    }
    bench.expect(&server, space, &bench.client("off").domain("nobody"), 1)?;
    bench.expect(&server, space, &bench.client("status").domain("nobody"), 1)?;
    // A list and a monitor would speak for hosts that nobody can ask.
    bench.expect(&server, space, &bench.client("monitor"), 1)?;
    let list = bench.client("list").run(space)?;
    ensure!(!list.stdout.contains(DOMAIN), "{list:?}");
    Ok(())
}
