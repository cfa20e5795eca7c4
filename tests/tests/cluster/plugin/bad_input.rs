//! Each kind of bad input is a failure with one line that says what is wrong, and no domain is
//! fenced.

use anyhow::{Result, ensure};
use fence_lab::cluster::shell::Shell as _;
use fence_lab::process::Finished;

use super::{HOSTLIST, PLUGIN, PluginScene, VICTIMS};

/// Parameters, arguments, and a part of the message.
type Case = (&'static str, &'static str, &'static str);

const CASES: &[Case] = &[
    (HOSTLIST, "-T off nobody", "no \"nobody\" in hostlist"),
    (HOSTLIST, "-T reset web-one", "no \"web-one\" in hostlist"),
    ("hostlist=", "-T off one", "hostlist is empty"),
    ("hostlist=' ,, '", "-T reset one", "hostlist is empty"),
    ("hostlist=' ,, '", "-l", "hostlist is empty"),
    ("hostlist=' ,, '", "-S", "hostlist is empty"),
    // Even if the request is for another host.
    ("hostlist='one:web-one two:'", "-T off one", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one :Web_Two'", "-T off one", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one:x'", "-T off one", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one -H:x'", "-T off one", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one *'", "-T off one", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one a;b'", "-l", "neither HOST nor HOST:DOMAIN"),
    ("hostlist='one:web-one ONE:Web_Two'", "-T off one", "\"ONE\" twice"),
    ("hostlist='one:web-one one:web-one'", "-S", "\"one\" twice"),
    ("hostlist='one:web-one two:web-one'", "-T off two", "\"web-one\" twice"),
    (
        "hostlist=one:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "-T off one",
        "longer than the 63 bytes",
    ),
    ("hostlist=one:web-one timeout=0", "-T off one", "timeout is a number"),
    ("hostlist=one:web-one timeout=2", "-T off one", "timeout is a number"),
    ("hostlist=one:web-one timeout=10s", "-S", "timeout is a number"),
    ("hostlist=one:web-one timeout=-5", "-T off one", "timeout is a number"),
    ("hostlist=one:web-one ipport=65536", "-T off one", "ipport is a port"),
    ("hostlist=one:web-one ipport=fence", "-T off one", "ipport is a port"),
    ("hostlist=one:web-one ipaddr=192.168.122.1 vsock=2", "-T off one", "keep one of them"),
    ("hostlist=one:web-one vsock=2 serial_device=/dev/null", "-S", "keep one of them"),
    ("hostlist=one:web-one ipaddr=hypervisor", "-T off one", "ipaddr is an IP address"),
    ("hostlist=one:web-one 'ipaddr=192.168.122.1 -o on'", "-T off one", "ipaddr is an IP address"),
    ("hostlist=one:web-one vsock=1", "-T off one", "vsock is the hypervisor's CID"),
    ("hostlist=one:web-one vsock=2x", "-T off one", "vsock is the hypervisor's CID"),
    ("hostlist=one:web-one vsock=99999999999", "-T off one", "vsock is the hypervisor's CID"),
    ("hostlist=one:web-one serial_device=ttyS1", "-T off one", "serial_device is a device"),
    ("hostlist=one:web-one serial_device=/etc/passwd", "-T off one", "no serial device /etc/passwd"),
    ("hostlist=one:web-one hash=md5", "-T off one", "Unsupported hash: md5"),
    ("hostlist=one:web-one ip_family=ipx", "-T off one", "Unsupported family"),
    ("hostlist=one:web-one key_file=/nowhere", "-T off one", "there is no key file /nowhere"),
    ("hostlist=one:web-one key_file=/nowhere", "-S", "there is no key file /nowhere"),
    ("hostlist=one:web-one key_file=/etc", "-T off one", "no regular file"),
    ("hostlist=one:web-one key_file=/dev/zero", "-T off one", "no regular file"),
    ("hostlist=one:web-one key_file=/etc/empty", "-T reset one", "is empty"),
    ("hostlist=one:nobody", "-T off one", "fence_xvm ended with 1"),
    ("hostlist=one:nobody", "-T on one", "fence_xvm ended with 1"),
    ("hostlist=one:nobody", "-T reset one", "fence_xvm ended with 1"),
    // A domain may have any name, which is never evaluated.
    ("hostlist='one:$(touch${IFS}/evil)'", "-T off one", "fence_xvm ended with 1"),
    ("hostlist='one:`touch</evil`;touch</evil'", "-T off one", "fence_xvm ended with 1"),
    ("hostlist='one:-o'", "-T off one", "fence_xvm ended with 1"),
    ("hostlist=one:web-one key_file='$(touch /evil)'", "-T off one", "there is no key file"),
    ("hostlist=one:web-one multicast_address='225.0.0.99;touch /evil' timeout=3", "-T off one", "fence_xvm"),
    // Another key than the hypervisor's gets no answer.
    ("hostlist=one:web-one key_file=/etc/other timeout=3", "-T off one", "Timed out waiting for response"),
];

/// Checks that the plugin failed, with one line of ours that has these words.
fn refused(done: &Finished, words: &str) -> Result<()> {
    ensure!(done.code.is_some_and(|code| code != 0), "{done:?}");
    let lines: Vec<_> = done.stderr.lines().filter(|line| line.starts_with("external/fence-xdp[")).collect();
    ensure!(matches!(lines[..], [line] if line.contains(": err: ") && line.contains(words)), "{words}: {done:?}");
    Ok(())
}

#[test]
fn a_wrong_finding_fails_and_says_why() -> Result<()> {
    let mut scene = PluginScene::new()?;
    let victims = VICTIMS.map(|victim| scene.witness(victim));
    scene.node.must(": > /etc/empty; head -c 64 /etc/cluster/fence_xvm.key > /etc/other")?;
    for (parameters, arguments, words) in CASES {
        let done = scene.stonith(parameters, arguments)?;
        refused(&done, words).map_err(|error| error.context(format!("{parameters} {arguments}")))?;
    }
    // Input that `stonith` cannot pass on, or would evaluate itself.
    for (arguments, words) in [
        ("off", "not 0 names"),
        ("off ''", "name of one host"),
        ("off one two", "not 2 names"),
        ("off 'one;touch /evil'", "in hostlist"),
        ("off '$(touch /evil)'", "in hostlist"),
        ("off 'o*'", "in hostlist"),
        ("off 'x\nexternal/fence-xdp[1]: notice: one is off'", "in hostlist"),
        ("poweroff one", "no such action: poweroff"),
        ("", "no action"),
    ] {
        refused(&scene.run(&format!("{HOSTLIST} {PLUGIN} {arguments}"))?, words)
            .map_err(|error| error.context(arguments))?;
    }
    // Every exit code of the client but 0, and a missing client.
    scene.node.write(
        "/fake/fence_xvm",
        b"#!/bin/sh\necho said\n[ $FAKE -lt 300 ] || kill -9 $$\nexit $FAKE\n",
        0o755,
    )?;
    for code in [1, 2, 3, 4, 126, 127, 253, 255, 300] {
        for action in ["off one", "on one", "reset one", "status"] {
            refused(&scene.run(&format!("{HOSTLIST} FAKE={code} PATH=/fake:$PATH {PLUGIN} {action}"))?, "")
                .map_err(|error| error.context(format!("{code} {action}")))?;
        }
    }
    scene.node.must("mv /usr/sbin/fence_xvm /usr/sbin/elsewhere")?;
    refused(&scene.stonith(HOSTLIST, "-T off one")?, "fence_xvm is missing")?;
    refused(&scene.stonith(HOSTLIST, "-S")?, "fence_xvm is missing")?;
    scene.node.must("mv /usr/sbin/elsewhere /usr/sbin/fence_xvm")?;

    let nothing = scene.node.must("ls /evil 2> /dev/null; true")?;
    ensure!(nothing.is_empty(), "something was evaluated");
    scene.server.crash()?;
    // At once, each with a port of its own for the callback.
    let mut script = String::new();
    for (port, arguments) in (1301..).zip(["-T off one", "-T on one", "-T reset one", "-S"]) {
        script += &format!(
            "(stonith -t external/fence-xdp {HOSTLIST} timeout=3 ipport={port} {arguments} 2> /tmp/{port}; echo $? >> /tmp/{port}) & "
        );
    }
    let done = scene.run(&format!("{script} wait; tail -n 2 /tmp/130?"))?;
    ensure!(done.stdout.matches("Timed out waiting for response").count() == 4, "{done:?}");
    ensure!(!done.stdout.lines().any(|line| line == "0"), "{done:?}");
    for victim in victims {
        ensure!(!victim?.is_dead()?, "a victim was fenced");
    }
    Ok(())
}
