//! The programs on an interface of the lab, and their counters, as the kernel reports them.
//!
//! `ip` and `bpftool` answer, not the daemon. tcx programs come from the kernel itself, because
//! Debian 12's `bpftool` is older than tcx.

use std::collections::BTreeMap;
use std::ops::Sub;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use serde_json::Value;

use crate::lab::{BRIDGE, Hypervisor};
use crate::tools;

/// The map with the counters.
pub const COUNTERS_MAP: &str = "fence_counters";

/// Commands with which people see the daemon's program on the bridge, where it is XDP.
pub const LOOK_INSIDE: [&str; 3] =
    ["bpftool net show dev virbr0", "bpftool prog show name fence_xdp", "bpftool map dump name fence_counters"];

/// A program attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The kernel's number for it.
    pub id: u64,
    /// Its name.
    pub name: String,
}

impl Program {
    /// Whether it is the daemon's, in whichever form.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        ["fence_xdp", "fence_xdp_frags", "fence_tc"].contains(&self.name.as_str())
    }
}

/// The counters by name, summed over the CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// A counter's value.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.0.get(name).copied().with_context(|| format!("no counter {name} among {:?}", self.0.keys()))
    }

    /// Those that are not zero.
    #[must_use]
    pub fn nonzero(&self) -> Vec<(&str, u64)> {
        self.0.iter().filter(|(_, value)| **value != 0).map(|(name, value)| (name.as_str(), *value)).collect()
    }
}

impl Sub<&Counters> for &Counters {
    type Output = Counters;

    /// What was counted since `earlier`.
    fn sub(self, earlier: &Counters) -> Counters {
        let before = |name| earlier.0.get(name).copied().unwrap_or(0);
        Counters(self.0.iter().map(|(name, value)| (name.clone(), value.wrapping_sub(before(name)))).collect())
    }
}

fn json(hypervisor: &Hypervisor, program: &str, arguments: &[&str]) -> Result<Value> {
    let output = hypervisor.space().must(program, arguments)?;
    serde_json::from_str(&output.stdout).with_context(|| format!("{program} {}", arguments.join(" ")))
}

/// The XDP program on an interface of the hypervisor, if there is one.
pub fn xdp_on(hypervisor: &Hypervisor, interface: &str) -> Result<Option<Program>> {
    let links = json(hypervisor, "ip", &["-j", "-d", "link", "show", "dev", interface])?;
    let Some(program) = links.pointer("/0/xdp/prog") else { return Ok(None) };
    let id = program.get("id").and_then(Value::as_u64).context("an attached program without a number")?;
    named(hypervisor, id).map(Some)
}

/// The tc programs on an interface of the hypervisor, in their order.
pub fn tcx_on(hypervisor: &Hypervisor, interface: &str) -> Result<Vec<Program>> {
    let programs = hypervisor.space().in_network(|| {
        let asked = SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
        let (_, programs) = asked.with_context(|| format!("the tc programs on {interface}"))?;
        Ok(programs.iter().map(ProgramInfo::id).collect::<Vec<_>>())
    })?;
    programs.into_iter().map(|id| named(hypervisor, id.into())).collect()
}

/// The daemon's program on an interface of the hypervisor, in any form, or a foreign XDP program.
pub fn program_on(hypervisor: &Hypervisor, interface: &str) -> Result<Option<Program>> {
    let ours = tcx_on(hypervisor, interface)?.into_iter().find(Program::is_ours);
    if ours.is_some() { Ok(ours) } else { xdp_on(hypervisor, interface) }
}

fn named(hypervisor: &Hypervisor, id: u64) -> Result<Program> {
    let name = json(hypervisor, "bpftool", &["-j", "prog", "show", "id", &id.to_string()])?;
    let name = name.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Program { id, name })
}

/// Puts a foreign XDP program on an interface of the hypervisor: our own, loaded by `bpftool`.
/// Without configuration it passes everything. Returns the program's number.
pub fn occupy(hypervisor: &Hypervisor, interface: &str) -> Result<u64> {
    let object = std::env::var_os("FENCE_EBPF_OBJECT")
        .map_or_else(|| tools::workspace().join("target/bpf/fence-xdp.o"), PathBuf::from);
    if !object.is_file() {
        bail!("no BPF object at {}: run `cargo xtask build`", object.display());
    }
    let space = hypervisor.space();
    space.must("bpftool", &["prog", "loadall", &object.to_string_lossy(), "/sys/fs/bpf/another"])?;
    place(hypervisor, interface)
}

/// Puts the foreign XDP program of [`occupy`] on an interface again. Returns the program's number.
pub fn place(hypervisor: &Hypervisor, interface: &str) -> Result<u64> {
    let arguments = ["net", "attach", "xdpgeneric", "pinned", "/sys/fs/bpf/another/fence_xdp", "dev", interface];
    hypervisor.space().must("bpftool", &arguments)?;
    Ok(xdp_on(hypervisor, interface)?.context("not attached")?.id)
}

/// The counters of the program on the bridge.
pub fn counters(hypervisor: &Hypervisor) -> Result<Counters> {
    sum(&dump(hypervisor, COUNTERS_MAP)?)
}

/// The content of a map of the program on the bridge, as bpftool prints it.
pub fn dump(hypervisor: &Hypervisor, name: &str) -> Result<Value> {
    json(hypervisor, "bpftool", &["-j", "map", "dump", "id", &map(hypervisor, name)?])
}

/// Writes an element of such a map, byte by byte (`0x07`).
pub fn put(hypervisor: &Hypervisor, name: &str, key: &[&str], value: &[&str]) -> Result<()> {
    let id = map(hypervisor, name)?;
    let start = ["map", "update", "id", &id, "key"];
    let arguments = [&start[..], key, &["value"], value].concat();
    hypervisor.space().must("bpftool", &arguments).map(drop)
}

/// The number of a map of the program on the bridge.
fn map(hypervisor: &Hypervisor, name: &str) -> Result<String> {
    let program = program_on(hypervisor, BRIDGE)?.context("no program on the bridge")?;
    let shown = json(hypervisor, "bpftool", &["-j", "prog", "show", "id", &program.id.to_string()])?;
    let maps = shown.get("map_ids").and_then(Value::as_array).cloned().unwrap_or_default();
    for id in maps.iter().filter_map(Value::as_u64) {
        let id = id.to_string();
        let map = json(hypervisor, "bpftool", &["-j", "map", "show", "id", &id])?;
        if map.get("name").and_then(Value::as_str) == Some(name) {
            return Ok(id);
        }
    }
    bail!("program {} has no map {name}", program.id)
}

/// Adds up the CPUs' values of each field in a dump of a per-CPU array with one element.
fn sum(dump: &Value) -> Result<Counters> {
    let cpus = dump.pointer("/0/formatted/values").and_then(Value::as_array);
    let cpus = cpus.context("the counters have no type information that bpftool can read")?;
    let mut counters = BTreeMap::new();
    for cpu in cpus {
        for (name, value) in cpu.get("value").and_then(Value::as_object).into_iter().flatten() {
            *counters.entry(name.clone()).or_default() += value.as_u64().unwrap_or(0);
        }
    }
    Ok(Counters(counters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_is_summed_over_cpus_and_compared_with_an_earlier_one() {
        let dump = |first: u64| {
            serde_json::json!([{"formatted": {"key": 0, "values": [
                {"cpu": 0, "value": {"delivered": first, "drop_port": 0}},
                {"cpu": 1, "value": {"delivered": 2, "drop_port": 1}},
            ]}}])
        };
        let (before, after) = (sum(&dump(1)).unwrap(), sum(&dump(5)).unwrap());
        assert_eq!(before.get("delivered").unwrap(), 3);
        assert_eq!((&after - &before).nonzero(), [("delivered", 4)]);
        assert!(before.get("no such").is_err());
        assert!(sum(&serde_json::json!([{"values": []}])).is_err());
    }
}
