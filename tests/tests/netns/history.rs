//! The history: what came of each request, also after the daemon's death.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use fence_lab::client::Family;
use fence_lab::peer::Peer;
use fence_lab::process::{Finished, poll_until, run};
use fence_lab::server::{START_LIMIT, Server, Which};
use fence_lab::tools;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bench::{Bench, DOMAIN, key};

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `fence-daemon history` on the hypervisor.
fn history(bench: &Bench, arguments: &[&str]) -> Result<Finished> {
    let Which::Ours(program) = Which::ours()? else { bail!("the stock server has no history") };
    let mut command = Command::new(program);
    command.args(["-f", &bench.hypervisor.path("fence_virt.conf"), "history"]).args(arguments);
    run(bench.hypervisor.space(), &mut command, LIMIT)
}

/// The records, each of the documented form.
fn records(bench: &Bench, arguments: &[&str]) -> Result<Vec<Value>> {
    let path = tools::workspace().join("docs/reference/history.schema.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let schema = jsonschema::validator_for(&serde_json::from_str(&text)?)?;
    let shown = history(bench, &[&["--json"], arguments].concat())?.success()?;
    let records: Vec<Value> = shown.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for record in &records {
        ensure!(schema.is_valid(record), "not as documented: {record:#}");
    }
    Ok(records)
}

/// The records about requests, as operation and result, when there are as many as wanted.
fn told(bench: &Bench, wanted: usize, arguments: &[&str]) -> Result<Vec<(String, String)>> {
    let text = |record: &Value, name: &str| record[name].as_str().unwrap_or_default().to_owned();
    poll_until("the lines of the history", LIMIT, || {
        let all = records(bench, arguments)?;
        let of: Vec<_> = all
            .iter()
            .filter(|record| record["event"] == "request")
            .map(|record| (text(record, "op"), text(record, "result")))
            .collect();
        Ok((of.len() >= wanted).then_some(of))
    })
}

#[test]
fn what_came_of_each_request_outlives_the_daemon() -> Result<()> {
    let bench = Bench::new()?;
    let text = bench.config("auto").render();
    let text = text.replacen('{', "{\n\thistory_directory = \"/run/fence-history\";", 1);
    let file = bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
    let serve = || {
        let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, 1229, &[])?;
        server.wait_ready(START_LIMIT)?;
        Ok::<_, anyhow::Error>(server)
    };
    let mut server = serve()?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    bench.expect_via(&server, &bench.about_domain("status"), 2, "kernel")?;
    bench.expect(&server, bench.guest.space(), &bench.client("off").domain("no body"), 1)?;
    let pair = |op: &str, result: &str| (op.to_owned(), result.to_owned());
    let expected = [pair("off", "success"), pair("status", "off"), pair("off", "failure")];
    ensure!(told(&bench, 3, &[])? == expected, "{:?}", told(&bench, 3, &[])?);
    server.crash()?;
    // Without a daemon too.
    ensure!(told(&bench, 3, &[])? == expected);
    ensure!(told(&bench, 1, &["--failed"])? == expected[2..]);
    ensure!(told(&bench, 2, &["--domain", DOMAIN])? == expected[..2]);
    ensure!(told(&bench, 0, &["--source", "192.0.2.1"])?.is_empty());
    ensure!(records(&bench, &["--since", "2020-01-01"])?.len() == 4);
    let mode = bench.hypervisor.space().must("stat", &["-c", "%a", "/run/fence-history/history"])?;
    ensure!(mode.stdout.trim() == "600", "{}", mode.stdout);

    let server = serve()?;
    bench.expect_via(&server, &bench.about_domain("on"), 0, "kernel")?;
    ensure!(told(&bench, 4, &[])?[3] == pair("on", "success"));
    ensure!(server.stop(Signal::SIGTERM)?.code == Some(0));
    let all = records(&bench, &[])?;
    ensure!(all.iter().enumerate().all(|(at, record)| record["id"] == at + 1), "{all:#?}");
    let starts = all.iter().filter(|record| record["event"] == "started").count();
    ensure!(starts == 2 && all.len() == 6, "{all:#?}");

    let table = history(&bench, &[])?.success()?.stdout;
    ensure!(table.lines().count() == 7 && table.contains("no body") && !table.contains('\x1b'), "{table}");
    let shown = history(&bench, &["show", "4"])?.success()?.stdout;
    for words in ["off of no body", "verified", "why ", "what to type:", "virsh domstate 'no body'"] {
        ensure!(shown.contains(words), "no {words}: {shown}");
    }
    let nothing = history(&bench, &["show", "99"])?;
    ensure!(nothing.code == Some(1) && nothing.stderr.contains("the history has 1 to 6"), "{}", nothing.stderr);
    Ok(())
}

#[test]
fn a_guest_without_its_key_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let mut request = peer.request(fence_common::wire::Op::Off, DOMAIN)?;
    request.hash_kind = 0;
    peer.send_bytes(zerocopy::IntoBytes::as_bytes(&request))?;
    let named = poll_until("the guest to be named", LIMIT, || {
        let all = records(&bench, &["--failed"])?;
        Ok(all.into_iter().find(|record| record["event"] == "unsigned"))
    })?;
    let id = named["id"].to_string();
    let shown = history(&bench, &["show", &id])?.success()?.stdout;
    let address = named["address"].as_str().context("no address")?;
    ensure!(shown.contains(&format!("root@{address}:/etc/cluster/fence_xvm.key")), "{shown}");
    ensure!(shown.contains(&format!("scp {} ", bench.key)), "{shown}");
    Ok(())
}

/// By systemd's own program.
#[test]
fn the_catalogue_of_messages_is_one_that_the_journal_takes() -> Result<()> {
    let root = tempfile::tempdir()?;
    let directory = root.path().join("usr/lib/systemd/catalog");
    std::fs::create_dir_all(&directory)?;
    let name = "fence-daemon.catalog";
    std::fs::copy(tools::workspace().join("dist").join(name), directory.join(name))?;
    let at_root = format!("--root={}", root.path().display());
    tools::output("journalctl", &[&at_root, "--update-catalog"], root.path())?;
    let shown = tools::output("journalctl", &[&at_root, "--dump-catalog"], root.path())?;
    ensure!(shown.matches("Defined-By: fence-daemon").count() == 6, "{shown}");
    Ok(())
}

/// The history's disk takes nothing: requests are served, and the log says once what is wrong.
#[test]
fn a_history_that_cannot_be_written_delays_no_fence() -> Result<()> {
    let bench = Bench::new()?;
    let text = bench.config("auto").render();
    let text = text.replacen('{', "{\n\thistory_directory = \"/proc/nowhere\";", 1);
    let file = bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, 1229, &[])?;
    server.wait_ready(START_LIMIT)?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    poll_until("a word about it in the log", LIMIT, || {
        Ok(server.log().contains("no history in /proc/nowhere").then_some(()))
    })
}
