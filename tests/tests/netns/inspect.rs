//! `status` of a running daemon: the page, its JSON, and who may read it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::kernel::program_on;
use fence_lab::lab::BRIDGE;
use fence_lab::process::{Finished, poll_until, run};
use fence_lab::server::{Config, Server, Which};
use fence_lab::tools;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::bench::{Bench, DOMAIN};

mod capture;

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The control socket of the lab's daemon.
const SOCKET: &str = "/run/fence-xdp/control.sock";

/// Exit statuses of `status`.
const SERVING: i32 = 0;
const DEGRADED: i32 = 1;
const NOBODY: i32 = 3;
const UNKNOWN: i32 = 4;

/// The daemon's program, which is also the client of its control socket.
fn program() -> Result<std::path::PathBuf> {
    match Which::ours()? {
        Which::Ours(program) => Ok(program),
        Which::Stock => bail!("the stock server has no status"),
    }
}

/// Runs `fence-daemon status` on the hypervisor.
fn status(bench: &Bench, arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new(program()?);
    command.args(["-f", &bench.hypervisor.path("fence_virt.conf"), "status"]).args(arguments);
    run(bench.hypervisor.space(), &mut command, LIMIT)
}

/// The report as JSON, validated by its schema.
fn report(bench: &Bench, code: i32) -> Result<Value> {
    let answer = status(bench, &["--json"])?;
    ensure!(answer.code == Some(code), "exit code {:?}: {}{}", answer.code, answer.stdout, answer.stderr);
    let report: Value = serde_json::from_str(&answer.stdout).with_context(|| answer.stdout.clone())?;
    check_form(&report)?;
    Ok(report)
}

/// Validates a report against `docs/reference/status.schema.json`.
fn check_form(report: &Value) -> Result<()> {
    let path = tools::workspace().join("docs/reference/status.schema.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let schema = jsonschema::validator_for(&serde_json::from_str(&text)?)?;
    let wrong: Vec<String> =
        schema.iter_errors(report).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(wrong.is_empty(), "not as documented: {wrong:?}: {report:#}");
    Ok(())
}

fn at<'r>(report: &'r Value, pointer: &str) -> Result<&'r Value> {
    report.pointer(pointer).with_context(|| format!("no {pointer} in {report:#}"))
}

/// Waits for a report that fulfils `wanted`.
fn wait_for(bench: &Bench, code: i32, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    poll_until(what, LIMIT, || {
        let answer = status(bench, &["--json"])?;
        let report: Value = serde_json::from_str(&answer.stdout).with_context(|| answer.stderr.clone())?;
        Ok((answer.code == Some(code) && wanted(&report)).then_some(report))
    })
}

/// A connection to the control socket, as another program than ours makes it.
fn connect(bench: &Bench) -> Result<UnixStream> {
    let stream = UnixStream::connect(bench.hypervisor.outside(SOCKET)).context("connecting to the control socket")?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// The daemon's whole answer to these bytes, up to the end of the connection.
fn raw(bench: &Bench, question: &[u8]) -> Result<String> {
    let mut stream = connect(bench)?;
    // The daemon may hang up before it has read everything.
    let _ = stream.write_all(question);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Err(error) if !answer.ends_with('\n') => Err(error).with_context(|| answer),
        Ok(_) | Err(_) => Ok(answer),
    }
}

#[test]
fn status_shows_the_served_requests() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    bench.expect_via(&server, &bench.about_domain("status"), 2, "kernel")?;
    bench.expect(&server, bench.hypervisor.space(), &bench.client("list"), 0)?;
    bench.expect(&server, bench.guest.space(), &bench.client("off").domain("no\x07body"), 1)?;

    let report = report(&bench, SERVING)?;
    ensure!(report["health"] == "serving" && report["problems"] == json!([]), "{report:#}");
    let program = program_on(&bench.hypervisor, BRIDGE)?.context("no program")?;
    ensure!(
        report["listeners"][0]["interfaces"]
            == json!([{
                "name": BRIDGE,
                "program": "generic",
                "program_id": program.id,
                "reason": null,
                "alone": true,
                "way_out": null
            }]),
        "{report:#}"
    );
    // The kernel's own view, through bpftool.
    let counted = bench.counters()?;
    ensure!(at(&report, "/kernel/counters/delivered")? == &json!(counted.get("delivered")?), "{report:#}");
    ensure!(report["socket"]["delivered"].as_u64() >= Some(1), "{report:#}");

    let recent = at(&report, "/requests/recent")?.as_array().context("no list")?.clone();
    let told: Vec<_> = recent
        .iter()
        .rev()
        .map(|request| (request["op"].as_str(), request["domain"].as_str(), request["result"].as_str()))
        .collect();
    let expected = [
        (Some("off"), Some(DOMAIN), Some("success")),
        (Some("status"), Some(DOMAIN), Some("off")),
        (Some("list"), None, Some("success")),
        (Some("off"), Some("no\\u{7}body"), Some("failure")),
    ];
    // The list may have come from each of the hypervisor's addresses; the stock client takes one
    // callback.
    let answered: Vec<_> = told.iter().copied().filter(|(_, _, result)| *result != Some("no callback")).collect();
    ensure!(answered == expected, "{told:?}");
    let steps = &recent.last().context("nothing")?["steps"];
    let steps: Vec<_> = ["verified_us", "called_back_us", "dead_us", "replied_us", "ended_us"]
        .iter()
        .map(|step| steps[step].as_u64())
        .collect();
    ensure!(steps.iter().all(Option::is_some) && steps.is_sorted(), "{steps:?}");
    ensure!(report["requests"]["answered"] == 4 && report["requests"]["in_progress"] == 0, "{report:#}");

    // Each step of each operation has a histogram with as many entries as there were requests.
    let latency = at(&report, "/latency")?.as_array().context("no list")?;
    let of = |op: &str, step: &str| latency.iter().find(|latency| latency["op"] == op && latency["step"] == step);
    let dead = of("off", "dead").context("no time of death")?;
    ensure!(dead["count"] == 1 && dead["p50_us"] == dead["max_us"] && dead["max_us"].as_u64() == steps[2], "{dead}");
    ensure!(of("off", "replied").is_some_and(|off| off["count"] == 2), "{latency:?}");
    ensure!(of("status", "dead").is_none() && of("list", "replied").is_some(), "{latency:?}");

    let domain = at(&report, "/uris/0/domains/0")?;
    ensure!(domain["name"] == DOMAIN && domain["state"] == "shut off" && domain["pid"].is_null(), "{domain}");
    Ok(())
}

#[test]
fn the_page_is_for_people_and_for_a_pipe_without_colours() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    let page = status(&bench, &[])?;
    ensure!(page.code == Some(SERVING) && page.stderr.is_empty(), "{:?} {}", page.code, page.stderr);
    for words in [
        "serving",
        "INTERFACE",
        BRIDGE,
        "xdp generic",
        "test:///default",
        "connected",
        DOMAIN,
        "DEAD",
        "delivered",
        "P99",
    ] {
        ensure!(page.stdout.contains(words), "no {words} in {}", page.stdout);
    }
    // A step that did not happen has no line.
    ensure!(!page.stdout.contains("drop_digest") && !page.stdout.contains('\x1b'), "{}", page.stdout);
    Ok(())
}

/// Debian 12's `bpftool net` does not know tcx, as the page says.
#[test]
fn where_the_program_is_tcx_bpftool_shows_it_by_its_name() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("tcx"))?;
    let shown = |command: &[&str]| Ok::<_, anyhow::Error>(bench.hypervisor.space().must("bpftool", command)?.stdout);
    let attached = program_on(&bench.hypervisor, BRIDGE)?.context("no program")?;
    let by_name = shown(&["prog", "show", "name", "fence_tc"])?;
    ensure!(by_name.contains(&format!("{}: sched_cls  name fence_tc ", attached.id)), "{by_name}");
    let net = shown(&["net", "show", "dev", BRIDGE])?;
    let knows_tcx = !shown(&["version"])?.starts_with("bpftool v7.1.");
    ensure!(net.contains("fence_tc") == knows_tcx, "{net}");
    Ok(())
}

#[test]
fn without_libvirt_it_is_degraded_and_says_so() -> Result<()> {
    let bench = Bench::new()?;
    let uris = vec!["qemu+unix:///system?socket=/run/nobody".to_owned(), "test:///default".to_owned()];
    let server = bench.serve(&Config { uris, ..bench.config("off") })?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    let report =
        wait_for(&bench, DEGRADED, "the failed connection", |report| !report["uris"][0]["last_error"].is_null())?;
    check_form(&report)?;
    ensure!(report["health"] == "degraded" && report["kernel"].is_null(), "{report:#}");
    let problems = report["problems"].as_array().context("no list")?;
    let [problem] = problems.as_slice() else { bail!("{problems:?}") };
    ensure!(problem.as_str().is_some_and(|text| text.contains("/run/nobody") && text.contains("virsh")), "{problem}");
    ensure!(report["uris"][0]["connected"] == false && report["uris"][1]["connected"] == true, "{report:#}");
    let page = status(&bench, &[])?;
    ensure!(page.code == Some(DEGRADED) && page.stdout.starts_with("degraded"), "{}", page.stdout);
    ensure!(page.stdout.contains("not connected") && page.stdout.contains("! qemu+unix"), "{}", page.stdout);
    Ok(())
}

#[test]
fn a_program_that_is_wanted_and_missing_is_a_problem() -> Result<()> {
    let bench = Bench::new()?;
    // A device on top misses the requests that the program takes out.
    bench.hypervisor.ip(&["link", "add", "top0", "link", BRIDGE, "type", "macvlan"])?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    let report = report(&bench, DEGRADED)?;
    ensure!(
        report["problems"][0].as_str().is_some_and(|text| text.contains("kernel program is not attached")),
        "{report:#}"
    );
    let interface = &report["listeners"][0]["interfaces"][0];
    ensure!(interface["program"].is_null() && report["listeners"][0]["hears"] == true, "{report:#}");
    ensure!(
        interface["reason"].as_str().is_some_and(|text| text.contains("top0, a device on top of it")),
        "{report:#}"
    );
    bench.hypervisor.ip(&["link", "del", "top0"])?;
    wait_for(&bench, SERVING, "the program to be attached", |report| {
        report["listeners"][0]["interfaces"][0]["program"] == "generic"
    })?;
    Ok(())
}

#[test]
fn while_it_waits_for_its_interface_it_can_be_asked_why() -> Result<()> {
    let bench = Bench::new()?;
    bench.hypervisor.delete_bridge()?;
    let server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    let has_socket = || Ok(bench.hypervisor.outside(SOCKET).exists().then_some(()));
    poll_until("the control socket", LIMIT, has_socket).with_context(|| server.log())?;
    let report = wait_for(&bench, DEGRADED, "the interface to be missed", |report| {
        report["listeners"][0]["status"].as_str().is_some_and(|status| status.contains(BRIDGE))
    })?;
    check_form(&report)?;
    ensure!(report["health"] == "starting" && report["listeners"][0]["hears"] == false, "{report:#}");
    Ok(())
}

#[test]
fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() -> Result<()> {
    let bench = Bench::new()?;
    let file = bench.hypervisor.outside(SOCKET);
    let mut server = bench.serve(&bench.config("auto"))?;
    let first = server.process().id();
    server.stop(Signal::SIGKILL)?;
    ensure!(file.exists());
    let nobody = status(&bench, &[])?;
    ensure!(nobody.code == Some(NOBODY) && nobody.stdout.is_empty(), "{:?} {}", nobody.code, nobody.stdout);
    ensure!(
        nobody.stderr.contains("no daemon answers") && nobody.stderr.contains("systemctl status"),
        "{}",
        nobody.stderr
    );

    let server = bench.serve(&bench.config("auto"))?;
    let second = report(&bench, SERVING)?;
    ensure!(second["daemon"]["pid"] != json!(first), "{second:#}");

    // A second daemon with another port and PID file, and the same state directory.
    let other = Config { port: Some(1230), attach: Some("off"), ..Config::new(&bench.key) };
    let text = other.render();
    let conf = bench.hypervisor.write("other.conf", text.as_bytes())?;
    let pid_file = bench.hypervisor.path("other.pid");
    let mut other = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &conf, 1230, &["-p", &pid_file])?;
    other.wait_ready(LIMIT)?;
    ensure!(other.log().contains("another daemon has its control socket"), "{}", other.log());
    ensure!(report(&bench, SERVING)?["daemon"]["pid"] == second["daemon"]["pid"]);
    ensure!(
        other.stop(Signal::SIGTERM)?.code == Some(0) && file.exists(),
        "the second daemon removed the first one's socket at its end"
    );

    ensure!(server.stop(Signal::SIGTERM)?.code == Some(0) && !file.exists(), "the socket stays behind");
    Ok(())
}

#[test]
fn only_root_may_look() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let mode = bench.hypervisor.space().must("stat", &["-c", "%a %u %F", SOCKET])?;
    ensure!(mode.stdout.trim() == "600 0 socket", "{}", mode.stdout);

    let nobody = |program: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]).args(arguments);
        run(bench.hypervisor.space(), &mut command, LIMIT)
    };
    // The build is in a directory that only root may enter.
    let copy = bench.copied_program()?;
    let refused = nobody(&copy, &["status"])?;
    ensure!(
        refused.code == Some(UNKNOWN) && refused.stderr.contains("only root"),
        "{:?} {}",
        refused.code,
        refused.stderr
    );

    // Even with the directory open to all.
    bench.hypervisor.space().must("chmod", &["755", "/run/fence-xdp"])?;
    bench.hypervisor.space().must("chmod", &["666", SOCKET])?;
    let refused = nobody(&copy, &["status", "--json"])?;
    ensure!(
        refused.code == Some(UNKNOWN) && refused.stderr.contains("only root"),
        "{:?} {}",
        refused.code,
        refused.stderr
    );
    ensure!(refused.stdout.is_empty(), "{}", refused.stdout);
    report(&bench, SERVING)?;
    Ok(())
}

#[test]
fn clients_that_hang_keep_nobody_from_being_fenced() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config("auto"))?;
    let used = server.process().processor_time()?;
    // Some clients send nothing, others send a question and never read.
    let mut hung = Vec::new();
    for _ in 0..100 {
        hung.push(connect(&bench)?);
        let mut deaf = connect(&bench)?;
        let _ = deaf.write_all(b"status\n");
        hung.push(deaf);
    }
    for (op, code) in [("off", 0), ("status", 2), ("on", 0), ("status", 0)] {
        bench.expect_via(&server, &bench.about_domain(op), code, "kernel")?;
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", server.process().id()))?.count();
    ensure!(descriptors < 60, "it holds {descriptors} descriptors");
    // Their time limit expires soon, and then other clients are served.
    poll_until("a place for an honest client", LIMIT, || {
        let answer = status(&bench, &["--json"])?;
        let told = answer.code == Some(SERVING);
        ensure!(told || answer.stderr.contains("too many clients"), "{:?} {}", answer.code, answer.stderr);
        Ok(told.then_some(()))
    })?;
    let used = server.process().processor_time()?.saturating_sub(used);
    ensure!(used < Duration::from_secs(1), "they cost {used:?} of processor time");
    drop(hung);
    Ok(())
}

#[test]
fn an_unknown_question_is_rejected() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    for question in [&b"reboot\n"[..], b"status", &[0; 100_000], b"\n", b"", b"status\xff\n"] {
        let answer = raw(&bench, question)?;
        let shown = question.escape_ascii().to_string();
        ensure!(answer.contains("\"error\":") && !answer.contains("health"), "{shown:.40}: {answer}");
    }
    // A line may end in LF or CRLF, and what follows it is ignored.
    for question in [&b"status\n"[..], b"status\r\nreboot\n"] {
        check_form(&serde_json::from_str(&raw(&bench, question)?)?)?;
    }
    Ok(())
}

/// The daemon serves without a control socket where it cannot make one, and says why.
#[test]
fn without_a_control_socket_it_serves() -> Result<()> {
    for (directory, why) in [
        (format!("/run/{}", "long/".repeat(30)), "is too long for a socket"),
        ("/proc/nowhere".to_owned(), "cannot make the directory"),
        ("/run/taken".to_owned(), "is no socket"),
    ] {
        let bench = Bench::new()?;
        bench.hypervisor.write("/run/taken/control.sock", b"somebody's")?;
        let config = bench.config("auto");
        let text =
            config.render().replacen("fence_virtd {", &format!("fence_virtd {{ state_directory = \"{directory}\";"), 1);
        let conf = bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
        let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &conf, 1229, &[])?;
        server.wait_ready(LIMIT)?;
        ensure!(server.log().contains("no control socket") && server.log().contains(why), "{}", server.log());
        bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
        let answer = status(&bench, &[])?;
        ensure!(answer.code != Some(0) && answer.stdout.is_empty() && !answer.stderr.is_empty(), "{answer:?}");
        ensure!(server.stop(Signal::SIGTERM)?.code == Some(0));
        ensure!(std::fs::read(bench.hypervisor.outside("/run/taken/control.sock"))? == b"somebody's");
    }
    Ok(())
}
