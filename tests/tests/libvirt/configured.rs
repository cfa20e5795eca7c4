//! Configuration files of stock installations, with their libvirt URI: both servers work with them
//! unchanged.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::lab::{COMMAND_LIMIT, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::run;
use fence_lab::qemu;
use fence_lab::server::{START_LIMIT, Server, Which};
use fence_lab::{packaged, tools};
use nix::sys::signal::Signal;

use crate::expect_listed;

/// Checks that both servers serve a stock client with this file and do not change it.
fn serves_under_both(hypervisor: &Hypervisor, file: &str, key: &str, guest: u8) -> Result<()> {
    let before = std::fs::read(hypervisor.outside(file))?;
    let guest = hypervisor.guest(guest)?;
    for which in [Which::ours()?, Which::Stock] {
        let mut server = Server::spawn_with_file(hypervisor, &which, file, 1229, &[])?;
        server.wait_ready(START_LIMIT)?;
        let list = Client::new("list", key).run(guest.space())?;
        ensure!(list.code == Some(0), "{}: {list:?}: {}", which.name(), server.log());
        expect_listed(&list, "vm1", "on").context(which.name())?;
        server.stop(Signal::SIGTERM)?;
    }
    ensure!(std::fs::read(hypervisor.outside(file))? == before, "a server has changed its file");
    Ok(())
}

#[test]
fn files_of_stock_installations_serve_under_both() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm1")?;

    // The file that Debian's package installs, with the key that it makes.
    let file = hypervisor.write("packaged.conf", packaged::configuration()?.as_bytes())?;
    serves_under_both(&hypervisor, &file, packaged::KEY, 1)?;

    // The file that stock's `-c` writes, with the answers of usual guides: defaults, but for
    // interface and key.
    let key = hypervisor.write("fence.key", &super::KEY)?;
    let file = hypervisor.path("stock.conf");
    let answers = hypervisor.write("answers", format!("y\n\n\n\n\nvirbr0\n{key}\n\n\ny\n").as_bytes())?;
    let script = format!("\"$0\" -c -f {file} < {answers}");
    let stock = tools::find("fence_virtd")?;
    let mut asked = Command::new("sh");
    run(hypervisor.space(), asked.args(["-c", &script]).arg(stock), COMMAND_LIMIT)?.success()?;
    serves_under_both(&hypervisor, &file, &key, 2)?;

    // The file that our `-c` writes from the same answers.
    let Which::Ours(ours) = Which::ours()? else { unreachable!("asked for ours") };
    let file = hypervisor.path("ours.conf");
    let script = format!("\"$0\" -c -f {file} < {answers}");
    let mut asked = Command::new("sh");
    run(hypervisor.space(), asked.args(["-c", &script]).arg(ours), COMMAND_LIMIT)?.success()?;
    serves_under_both(&hypervisor, &file, &key, 3)
}
