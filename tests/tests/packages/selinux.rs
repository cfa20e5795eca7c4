//! The SELinux module in Debian's policy: its compiler takes it, and its analyser says what the
//! daemon may do and what it may not. No kernel enforces it here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::tools;

use crate::host::package;

/// Debian's policy, and the tools that compile and analyse it.
const PACKAGES: [&str; 7] = [
    "selinux-policy-default",
    "policycoreutils",
    "secilc",
    "setools",
    "python3-setools",
    "libsepol2",
    "python3-networkx",
];
/// The module of the policy that the daemon's names, and those that it needs itself. The whole
/// policy takes a quarter of a minute to compile.
const MODULES: [&str; 3] = ["base", "qemu", "virt"];
/// What the base says about users, whose roles other modules bring.
const OF_USERS: [&str; 2] = ["(selinuxuser", "(userprefix"];

/// Where those packages are unpacked, once.
fn unpacked() -> Result<PathBuf> {
    let cache = tools::target_directory().join("lab-cache");
    fs::create_dir_all(&cache)?;
    let lock = File::create(cache.join("selinux.lock"))?;
    lock.lock().context("locking the lab's cache")?;
    let root = cache.join("selinux");
    if !root.is_dir() {
        let work = tempfile::tempdir_in(&cache)?;
        let download = [&["download"][..], &PACKAGES].concat();
        tools::output("apt-get", &download, work.path()).context("downloading Debian's policy and its tools")?;
        let unpack = "for deb in *.deb; do dpkg-deb --extract $deb root; done";
        tools::output("sh", &["-c", unpack], work.path())?;
        fs::rename(work.path().join("root"), &root)?;
    }
    Ok(root)
}

/// Runs a program of those packages.
fn run(root: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let libraries = root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
    let mut command = Command::new(root.join(program));
    command.args(arguments).env("LD_LIBRARY_PATH", libraries);
    command.env("PYTHONPATH", root.join("usr/lib/python3/dist-packages"));
    let done = command.output().with_context(|| format!("cannot run {program}"))?;
    let errors = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program} {arguments:?}: {errors}");
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[test]
fn the_module_permits_what_a_fence_takes_and_no_more() -> Result<()> {
    let root = unpacked()?;
    let work = tempfile::tempdir()?;
    let place = |name: &str| work.path().join(name).to_string_lossy().into_owned();
    let deb = package("fence-xdp_", ".deb")?;
    tools::output("dpkg-deb", &["--extract", &deb.to_string_lossy(), &place("deb")], work.path())?;
    let own = place("deb/usr/share/selinux/packages/fence-xdp.cil");

    let mut sources = vec![own];
    for module in MODULES {
        let packed = root.join(format!("usr/share/selinux/default/{module}.pp.bz2"));
        let (binary, source) = (place(&format!("{module}.pp")), place(&format!("{module}.cil")));
        tools::output("sh", &["-c", "bzcat \"$0\" > \"$1\"", &packed.to_string_lossy(), &binary], work.path())?;
        run(&root, "usr/libexec/selinux/hll/pp", &[&binary, &source])?;
        let text = fs::read_to_string(&source)?;
        let kept = text.lines().filter(|line| !OF_USERS.iter().any(|begin| line.starts_with(begin)));
        fs::write(&source, kept.collect::<Vec<_>>().join("\n"))?;
        sources.push(source);
    }
    let (policy, contexts) = (place("policy"), place("contexts"));
    let mut arguments = vec!["--mls", "true", "--disable-dontaudit", "--output", &policy, "--filecontexts", &contexts];
    arguments.extend(sources.iter().map(String::as_str));
    run(&root, "usr/bin/secilc", &arguments)?;

    let contexts = fs::read_to_string(&contexts)?;
    let label = |path: &str| contexts.lines().find(|line| line.starts_with(path)).unwrap_or_default().to_owned();
    ensure!(label("/usr/sbin/fence-daemon").contains(":fence_xdp_exec_t:"), "{}", label("/usr/sbin/fence-daemon"));
    ensure!(label("/run/fence-xdp").contains(":fence_xdp_runtime_t:"));

    let rules = run(&root, "usr/bin/sesearch", &["--allow", "--source", "fence_xdp_t", &policy])?;
    let may = |target: &str, class: &str, right: &str| {
        let begin = format!("allow fence_xdp_t {target}:{class} ");
        rules.lines().any(|rule| {
            rule.strip_prefix(&begin).is_some_and(|rights| {
                rights.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|one| one == right)
            })
        })
    };
    for (target, class, right) in [
        ("virt_domain", "process", "sigkill"),
        ("virtd_lxc_t", "process", "sigkill"),
        ("virt_domain", "process", "ptrace"),
        ("virtd_t", "unix_stream_socket", "connectto"),
        ("fence_xdp_t", "bpf", "prog_load"),
        ("fence_xdp_t", "capability", "sys_ptrace"),
        ("zented_port_t", "tcp_socket", "name_connect"),
        ("domain", "file", "open"),
        ("fence_xdp_runtime_t", "sock_file", "create"),
    ] {
        ensure!(may(target, class, right), "no {right} of {class} {target}: {rules}");
    }
    // By whatever attribute a rule has it: the analyser resolves them.
    for (target, class, right) in [
        ("init_t", "process", "sigkill"),
        ("syslogd_t", "process", "sigkill"),
        ("syslogd_t", "process", "ptrace"),
        ("fence_xdp_t", "capability", "sys_admin"),
        ("fence_xdp_t", "capability", "setuid"),
        ("fence_xdp_t", "process", "execmem"),
        ("shadow_t", "file", "read"),
        ("etc_t", "file", "write"),
        ("virt_image_t", "file", "read"),
        ("virt_image_t", "file", "write"),
        ("security_t", "security", "load_policy"),
    ] {
        let asked =
            ["--allow", "--source", "fence_xdp_t", "--target", target, "--class", class, "--perm", right, &policy];
        let found = run(&root, "usr/bin/sesearch", &asked)?;
        ensure!(found.trim().is_empty(), "{found}");
    }
    let started = run(
        &root,
        "usr/bin/sesearch",
        &["--type_trans", "--source", "init_t", "--target", "fence_xdp_exec_t", &policy],
    )?;
    ensure!(started.contains("process fence_xdp_t"), "{started}");
    Ok(())
}
