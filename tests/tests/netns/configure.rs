//! Configuration files are interchangeable: a file that one server's `-c` writes works with either
//! server.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::client::{Client, Family};
use fence_lab::lab::COMMAND_LIMIT;
use fence_lab::packaged;
use fence_lab::process::{Finished, run};
use fence_lab::server::{START_LIMIT, Server, Which};
use fence_lab::tools;

use crate::bench::{Bench, listed};

/// Runs a server's program with `answers` on its standard input.
fn pipe_into(bench: &Bench, which: &Which, arguments: &[&str], answers: &str) -> Result<Finished> {
    let program = match which {
        Which::Ours(path) => path.display().to_string(),
        Which::Stock => tools::find("fence_virtd")?.display().to_string(),
    };
    let answers = bench.hypervisor.write("answers", answers.as_bytes())?;
    let script = format!("\"$0\" \"$@\" < {answers}");
    run(bench.hypervisor.space(), Command::new("sh").args(["-c", &script, &program]).args(arguments), COMMAND_LIMIT)
}

/// Checks that both servers, one after the other, serve the stock client with this file and do not
/// change it.
fn serves_under_both(bench: &Bench, file: &str, family: Family) -> Result<()> {
    let before = std::fs::read(bench.hypervisor.outside(file))?;
    for which in [Which::ours()?, Which::Stock] {
        let mut server = Server::spawn_with_file(&bench.hypervisor, &which, file, 1229, &[])?;
        server.wait_ready(START_LIMIT).with_context(|| format!("{} with {file}", which.name()))?;
        let client: Client = bench.client("list").family(family);
        let list = bench.expect(&server, bench.guest.space(), &client, 0).with_context(|| which.name())?;
        ensure!(listed(&list)? == "on", "{}: {list:?}", which.name());
        server.stop(nix::sys::signal::Signal::SIGTERM)?;
    }
    ensure!(std::fs::read(bench.hypervisor.outside(file))? == before, "a server has changed its file");
    Ok(())
}

/// Answers to both servers' questions, in their order, for a new file.
fn answers(address: &str, interface: &str, key: &str) -> String {
    format!("y\n\nmulticast\n{address}\n1229\n{interface}\n{key}\nlibvirt\ntest:///default\ny\n")
}

#[test]
fn a_file_from_our_questions_serves_both_daemons() -> Result<()> {
    let bench = Bench::new()?;
    for (name, address, interface, family) in
        [("v4", "", "virbr0", Family::V4), ("any", "", "none", Family::V4), ("v6", "ff05::3:1", "virbr0", Family::V6)]
    {
        let file = bench.hypervisor.path(&format!("{name}.conf"));
        let asked = pipe_into(&bench, &Which::ours()?, &["-c", "-f", &file], &answers(address, interface, &bench.key))?;
        ensure!(asked.code == Some(0), "{}{}", asked.stdout, asked.stderr);
        serves_under_both(&bench, &file, family)?;

        // Both servers accept what check-config prints.
        let printed = pipe_into(&bench, &Which::ours()?, &["check-config", "-f", &file], "")?.success()?;
        let printed = bench.hypervisor.write(&format!("{name}-checked.conf"), printed.stdout.as_bytes())?;
        serves_under_both(&bench, &printed, family)?;
    }
    Ok(())
}

#[test]
fn a_file_from_our_options_serves_both_daemons() -> Result<()> {
    let bench = Bench::new()?;
    let (file, key) = (bench.hypervisor.path("options.conf"), bench.hypervisor.path("made/fence.key"));
    let arguments = [
        "-c",
        "--yes",
        "--create-key",
        "-f",
        &file,
        "--interface",
        "virbr0",
        "--key-file",
        &key,
        "--uri",
        "test:///default",
        "--hash",
        "sha256",
        "--auth",
        "sha256",
    ];
    pipe_into(&bench, &Which::ours()?, &arguments, "")?.success()?;
    let bench = Bench { key, ..bench };
    serves_under_both(&bench, &file, Family::V4)
}

#[test]
fn a_file_from_fence_virtds_questions_serves_both_daemons() -> Result<()> {
    let bench = Bench::new()?;
    let file = bench.hypervisor.path("stock.conf");
    let asked = pipe_into(&bench, &Which::Stock, &["-c", "-f", &file], &answers("", "virbr0", &bench.key))?;
    ensure!(asked.code == Some(0), "{}{}", asked.stdout, asked.stderr);
    serves_under_both(&bench, &file, Family::V4)
}

/// Answers that people pipe into fence_virtd mean the same here, also with an existing file.
#[test]
fn one_script_of_answers_means_the_same_to_both() -> Result<()> {
    let bench = Bench::new()?;
    let old = format!(
        "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n\
         listeners {{ multicast {{ key_file = \"{}\"; interface = \"eth9\"; port = \"1230\"; hash = \"sha512\"; }} }}\n\
         groups {{ group {{ name = \"g\"; ip = \"192.168.122.11\"; uuid = \"test\"; uuid = \"node2\"; }} }}\n",
        bench.key
    );
    let mut understood = Vec::new();
    for (which, name) in [(Which::ours()?, "ours.conf"), (Which::Stock, "stock.conf")] {
        let file = bench.hypervisor.write(name, old.as_bytes())?;
        let asked = pipe_into(&bench, &which, &["-c", "-f", &file], "\n\n\n\nvirbr0\n\n\ntest:///default\ny\n")?;
        ensure!(asked.code == Some(0), "{}: {}{}", which.name(), asked.stdout, asked.stderr);
        let checked = pipe_into(&bench, &Which::ours()?, &["check-config", "-f", &file], "")?.success()?;
        // Each server has its own module path, and fence_virtd reverses the order of a group's
        // members.
        let mut lines: Vec<_> =
            checked.stdout.lines().filter(|line| !line.contains("module_path")).map(str::to_owned).collect();
        lines.sort();
        understood.push(lines);
    }
    ensure!(understood[0] == understood[1], "{:#?}\n{:#?}", understood[0], understood[1]);
    ensure!(understood[0].iter().any(|line| line.contains("\"virbr0\"")), "{:?}", understood[0]);
    Ok(())
}

#[test]
fn exit_codes_are_those_of_stock() -> Result<()> {
    let bench = Bench::new()?;
    let good = bench.hypervisor.write("good.conf", bench.config("auto").render().as_bytes())?;
    let bad = bench.hypervisor.write("bad.conf", b"fence_virtd {")?;
    let running = bench.serve(&bench.config("auto"))?;
    let missing = bench.hypervisor.path("missing.conf");
    for (arguments, ours, stock) in [
        (&["-h"][..], 0, 0),
        (&["-l"], 0, 0),
        (&["-F", "-f", &bad], 255, 255),
        (&["-f", &bad], 255, 255),
        (&["-F", "-f", &missing], 255, 255),
        (&["-F", "-f", &good], 1, 1),
        (&["-c", "-f", &missing], 1, 1),
        (&["-c", "-f", &good], 1, 1),
        // The one deliberate difference: a configuration that was not understood is no success.
        (&["-Z"], 255, 0),
    ] {
        for (which, expected) in [(Which::ours()?, ours), (Which::Stock, stock)] {
            let ended = pipe_into(&bench, &which, arguments, "")?;
            ensure!(ended.code == Some(expected), "{} {arguments:?}: {ended:?}", which.name());
        }
    }
    drop(running);
    Ok(())
}

#[test]
fn the_packages_own_file_is_understood_without_a_doubt() -> Result<()> {
    let bench = Bench::new()?;
    let file = bench.hypervisor.write("packaged.conf", packaged::configuration()?.as_bytes())?;
    let checked = pipe_into(&bench, &Which::ours()?, &["check-config", "-f", &file], "")?;
    ensure!(checked.code == Some(0) && checked.stderr.is_empty(), "{checked:?}");
    Ok(())
}
