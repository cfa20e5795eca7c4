//! Watches which node runs the resource that must never run twice, in a cluster of QEMU guests. The
//! nodes write it to a shared disk, and this process reads the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::sync::lock;
use fence_lab::cluster::shell::ONLINE_LIMIT;
use fence_lab::lab::Hypervisor;
use fence_lab::process::poll_until;
use fence_lab::witness::Witness;
use fence_lab::worker::Worker;

/// Where the resource's agent is: Pacemaker's `ocf:fencelab:claim`.
pub(super) const AGENT_PATH: &str = "/usr/lib/ocf/resource.d/fencelab/claim";
/// Its text.
pub(super) const AGENT: &str = include_str!("assets/claim.sh");
/// A node's part of the disk.
const SECTOR: usize = 512;
/// How often the disk is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Watches the disk. Dropping it ends the watch.
#[derive(Debug)]
pub(super) struct Claims {
    seen: Arc<Mutex<SeenClaims>>,
    _watcher: Worker,
}

#[derive(Debug, Default)]
struct SeenClaims {
    /// What each sector said last.
    sectors: [String; 2],
    /// The machines that hold the resource by their own word. A dead one cannot take its word back.
    holders: [Option<Witness>; 2],
    /// Which node has begun to run it, and when.
    begun: Vec<(usize, Instant)>,
    violations: Vec<String>,
}

impl Claims {
    /// Begins to watch a disk of the lab. Each domain writes to the sector of its number here.
    pub(super) fn watch(hypervisor: &Hypervisor, disk: &str, domains: [String; 2]) -> Result<Self> {
        let disk = File::open(hypervisor.outside(disk)).context("the shared disk")?;
        let (seen, hypervisor) = (Arc::new(Mutex::new(SeenClaims::default())), hypervisor.clone());
        let watcher = Worker::start({
            let seen = Arc::clone(&seen);
            move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = look(&disk, &hypervisor, &domains, &seen) {
                        lock(&seen).violations.push(format!("nobody watches any more: {error:#}"));
                        break;
                    }
                    std::thread::sleep(LOOK);
                }
                Ok(())
            }
        });
        Ok(Self { seen, _watcher: watcher })
    }

    /// Waits until a node has begun to run the resource (after `since`), and says when.
    pub(super) fn wait(&self, number: usize, since: Option<Instant>) -> Result<Instant> {
        poll_until(&format!("the resource to run on node {number}"), ONLINE_LIMIT, || {
            self.check()?;
            let seen = lock(&self.seen);
            Ok(seen.begun.iter().find(|(who, when)| *who == number && Some(*when) > since).map(|(_, when)| *when))
        })
    }

    /// That it has never run twice so far.
    pub(super) fn check(&self) -> Result<()> {
        let seen = lock(&self.seen);
        ensure!(seen.violations.is_empty(), "{:?}", seen.violations);
        Ok(())
    }
}

/// Reads the disk once, and notes what has changed.
fn look(disk: &File, hypervisor: &Hypervisor, domains: &[String; 2], seen: &Mutex<SeenClaims>) -> Result<()> {
    let mut bytes = [0; 2 * SECTOR];
    disk.read_exact_at(&mut bytes, 0).context("reading the shared disk")?;
    let mut seen = lock(seen);
    for (number, sector) in bytes.chunks(SECTOR).enumerate() {
        let text = String::from_utf8_lossy(sector).trim_matches(['\0', ' ', '\n']).to_owned();
        if text == seen.sectors[number] {
            continue;
        }
        if text.starts_with("running") {
            // Before anything else: a death that comes later is no excuse.
            let other = 1 - number;
            if let Some(holder) = &seen.holders[other]
                && !holder.is_dead()?
            {
                let living = holder.describe();
                let violation = format!("TWICE: {} runs it while {} has it, {living}", domains[number], domains[other]);
                seen.violations.push(violation);
            }
            seen.begun.push((number, Instant::now()));
            seen.holders[number] = Some(Witness::of_qemu(hypervisor, &domains[number])?);
        } else {
            seen.holders[number] = None;
        }
        seen.sectors[number] = text;
    }
    Ok(())
}
