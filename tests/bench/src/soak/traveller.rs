//! A machine that migrates between the hypervisors, and is fenced on its way.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use fastrand::Rng;
use fence_common::wire::Op;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::witness::Witness;

use super::client::Asker;
use super::faults::FaultKind;
use super::judge::{Judge, Request, Told};
use super::site::World;
use super::trouble::virsh;
use super::{Pace, SoakPlan, rest};

/// When the request comes, after the migration's beginning, at the latest.
const ON_ITS_WAY: Duration = Duration::from_millis(900);
/// How long virsh may take to see the end of a migration.
const ARRIVES: Duration = Duration::from_secs(45);
/// How long the other libvirtd may take to end a machine that has not arrived.
const UNDONE: Duration = Duration::from_secs(90);

/// Migrates the machine again and again.
pub(super) fn travel(world: &World, judge: &Judge, pace: Pace, over: &AtomicBool, mut rng: Rng) -> Result<()> {
    loop {
        rest(over, SoakPlan::up_to(&mut rng, 2 * pace.client));
        if over.load(Ordering::Relaxed) {
            return Ok(());
        }
        // While a libvirtd is away, it cannot be found or does not move: that is nobody's fault.
        if let Err(error) = journey(world, judge, &mut rng) {
            judge.is_violation(0, &error);
        }
    }
}

/// Where the machine is defined, and whether it runs there. `None`: at neither hypervisor, by the
/// word of both.
fn place(world: &World) -> Result<Option<(usize, bool)>> {
    let mut found = None;
    for (number, host) in world.hosts.iter().enumerate() {
        let listed = |state: &str| -> Result<bool> {
            let names = virsh(&host.hypervisor, qemu::URI, &["list", state, "--name"])?.stdout;
            Ok(names.lines().any(|line| line == world.nomad.name))
        };
        if listed("--all")? {
            let runs = listed("--state-running")?;
            // Where it runs, if an interrupted migration has left it at both.
            found = if runs { Some((number, true)) } else { found.or(Some((number, false))) };
        }
    }
    Ok(found)
}

fn journey(world: &World, judge: &Judge, rng: &mut Rng) -> Result<()> {
    let name = &world.nomad.name;
    let Some((from, runs)) = place(world)? else {
        let definition = world.nomad.definition().xml()?;
        let hypervisor = &world.hosts[0].hypervisor;
        let file = hypervisor.write("nomad.xml", definition.as_bytes())?;
        return virsh(hypervisor, qemu::URI, &["define", &file]).map(drop);
    };
    let (here, there) = (&world.hosts[from], &world.hosts[1 - from]);
    if !runs {
        virsh(&here.hypervisor, qemu::URI, &["start", name])?;
    }
    // Those here: the other libvirtd may be late to end what an earlier journey has left there.
    let victims = Witness::of_all(&here.hypervisor, name)?;
    let begun = Instant::now();
    let mut command = Command::new("virsh");
    command.args(["-q", "-c", qemu::URI, "migrate", "--live", "--persistent", "--undefinesource", name]);
    command.args([format!("qemu+tcp://{}/system", there.address), format!("tcp://{}", there.address)]);
    let migration = Process::start(here.hypervisor.space(), &mut command)?;
    std::thread::sleep(SoakPlan::up_to(rng, ON_ITS_WAY));

    // Where it goes to, a process that has left is nobody's victim any more.
    let (asked, victims) = if rng.u8(..4) == 0 { (there, Vec::new()) } else { (here, victims) };
    let op = [Op::Off, Op::Off, Op::Reboot, Op::Status][rng.usize(..4)];
    let mut asker = Asker::OwnMulticast(asked.guests.get(1).context("no guest")?.clone());
    let (sent, way, outages) = (Instant::now(), asker.way(), &asked.outages);
    let said = asker.ask(asked, op, name, &victims)?;
    judge.ended(&Request { way, op, told: said.told, sent, outages, victims: victims.len() });

    let has_arrived = migration.ends_within(ARRIVES)? && migration.finish(Duration::ZERO)?.code == Some(0);
    judge.note(|notes| {
        notes.migrations.0 += usize::from(has_arrived);
        notes.migrations.1 += usize::from(!has_arrived && op == Op::Off && said.told == Told::Success);
    });
    let is_off = op == Op::Off && said.told == Told::Success;
    // A daemon that did not run when the machine left does not know of it
    // (docs/design/migration.md).
    if !is_off || [here, there].iter().any(|host| host.outages.since(begun, FaultKind::is_of_daemon)) {
        return Ok(());
    }
    // Nobody else starts it.
    let gone = poll_until("a machine that was fenced on its way to be gone", UNDONE, || {
        Ok(world.nomad.living(&here.hypervisor)?.is_empty().then_some(()))
    });
    if gone.is_err() {
        let arrived = if has_arrived { "arrived" } else { "did not arrive" };
        judge.violation(format_args!("FALSE SUCCESS: {name} was off for its client, {arrived}, and lives"));
    }
    Ok(())
}
