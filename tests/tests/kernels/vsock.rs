//! The vsock listener beside fence_virtd's, in a guest whose only vsock leads to itself: a machine
//! that is itself a guest has somebody else's hypervisor at its own vsock.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use fence_lab::debian::{Kernel, Series};
use fence_lab::testdriver::{State, TestDomain, node, uuid};
use fence_lab::tools;

use crate::guest::{self, Done, Extra, Step};

/// In the order of loading.
const MODULES: [&str; 3] =
    ["net/vmw_vsock/vsock.ko", "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko", "net/vmw_vsock/vsock_loopback.ko"];

/// What fence_virtd loads at run time.
const STOCK_MODULES: [&str; 2] =
    ["/usr/lib/x86_64-linux-gnu/fence-virt/vsock.so", "/usr/lib/x86_64-linux-gnu/fence-virt/virt.so"];

/// Asks one server after the other, and says the exit code and the words of each answer.
const SCRIPT: &str = "
$1 -F -f /$2.conf -p /tmp/pid > /tmp/log 2>&1 &
server=$!
tries=0
until fence_virt -S2 -k /key -o monitor > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 150 ] || { cat /tmp/log; exit 1; }
    sleep 0.2
done
shift 2
for asked in \"$@\"; do
    words=$(fence_virt -S2 $asked 2>&1)
    code=$?
    echo \"@said $asked: $code $(echo \"$words\" | sort | tr '\\n' ';')\"
done
kill $server
wait $server
grep via=vsock /tmp/log
true
";

/// Asks beside connections that say nothing, or too little: more than the daemon has places. Says
/// how each honest client ended.
const CROWD_SCRIPT: &str = "
ulimit -n 2048
fence-daemon -F -f /all.conf -p /tmp/pid > /tmp/log 2>&1 &
server=$!
until fence_virt -S2 -k /key -o monitor > /dev/null 2>&1; do sleep 0.2; done
perl /crowd.pl > /tmp/crowd 2>&1 &
crowd=$!
until grep -q full /tmp/crowd; do
    kill -0 $crowd || { cat /tmp/crowd; exit 1; }
    sleep 0.1
done
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
    fence_virt -S2 -k /key -o status -H vm-on > /tmp/words 2>&1
    echo \"@said honest $number: $?\"
done
kill -0 $crowd || { cat /tmp/crowd; exit 1; }
fence-daemon -f /all.conf status --json | tr -d ' ' | grep -o '\"drop_length\":[0-9]*' | sort -u
kill $crowd
kill $server
wait $server
";

/// Opens connections to the listener without end, and keeps the newest of them open. It says
/// nothing on most, and less than a request on the others.
const CROWD: &str = "
$SIG{PIPE} = 'IGNORE';
$| = 1;
for (my $count = 1; ; $count++) {
    socket(my $socket, 40, 1, 0) or die qq(socket: $!);
    # Family, port, CID.
    connect($socket, pack('SSLLL', 40, 0, 1229, 2, 0)) or die qq(connect: $!);
    syswrite($socket, 'x' x 100) if $count % 10 == 0;
    push @open, $socket;
    shift @open if @open > 1000;
    print qq(full\\n) if $count == 1000;
    select(undef, undef, undef, 0.001);
}
";

/// Has the plugin fence over the vsock, with its parameters as cluster-glue gives them.
const PLUGIN_SCRIPT: &str = "
fence-daemon -F -f /all.conf -p /tmp/pid > /tmp/log 2>&1 &
server=$!
until fence_virt -S2 -k /key -o monitor > /dev/null 2>&1; do sleep 0.2; done
export hostlist=one:vm-on vsock=2 key_file=/key
for action in status 'off one' 'on one' 'reset one' 'off two'; do
    words=$(sh /plugin $action 2> /tmp/errors)
    echo \"@said $action: $? $words\"
done
hash=sha1 sh /plugin off one > /dev/null 2> /tmp/errors
echo \"@said off too weakly signed: $?\"
kill $server
wait $server
grep via=vsock /tmp/log
";

const ALL: [&str; 13] = [
    "-k /key -o monitor",
    "-k /key -o status -H vm-on",
    "-k /key -o status -H vm-off",
    "-k /key -o status -H nobody",
    "-k /key -o list",
    "-k /key -o off -H vm-on",
    "-k /key -o status -H vm-on",
    "-k /key -o on -H vm-on",
    "-k /key -o reboot -H vm-on",
    "-k /key -o off -H nobody",
    "-k /other -o off -H vm-on",
    "-k /key -C sha1 -o off -H vm-on",
    "-k /key -o status -H vm-on",
];

const GROUPED: [&str; 4] =
    ["-k /key -o off -H vm-on", "-k /key -o off -H vm-off", "-k /key -o list", "-k /key -o monitor"];

fn config(groups: &str) -> String {
    format!(
        "fence_virtd {{ listener = \"vsock\"; backend = \"libvirt\"; }}\n\
         listeners {{ vsock {{ key_file = \"/key\"; }} }}\n\
         backends {{ libvirt {{ uri = \"test:///node.xml\"; }} }}\n{groups}"
    )
}

fn of_group(member: &str) -> String {
    config(&format!("groups {{ group {{ {member} uuid = \"vm-on\"; }} }}\n"))
}

fn step(name: &'static str, server: &str, config: &str, asked: &[&str]) -> Step {
    let asked: String = asked.iter().map(|asked| format!(" '{asked}'")).collect();
    Step { name, command: format!("sh /ask.sh {server} {config}{asked}") }
}

/// The lines about answers: the question, and the exit code with the client's words. Of a client
/// with another key or digest only the code: its words are random, or depend on the moment.
fn said<'d>(done: &'d Done) -> Vec<(&'d str, &'d str)> {
    let lines = done.output.iter().filter_map(|line| line.split_once("@said ")?.1.split_once(": "));
    let is_odd = |asked: &str| asked.contains("/other") || asked.contains("sha1");
    let code = |answer: &'d str| answer.split(' ').next().unwrap_or_default();
    lines.map(|(asked, answer)| (asked, if is_odd(asked) { code(answer) } else { answer.trim() })).collect()
}

#[test]
fn every_operation_over_vsock_is_answered_as_stock_answers_it() -> Result<()> {
    let kernel = Kernel::get(Series::Linux6_1)?;
    let programs = guest::executables()?;
    let domains =
        [TestDomain::new("vm-on", &uuid(1), State::Running), TestDomain::new("vm-off", &uuid(2), State::ShutOff)];
    let extra = Extra {
        modules: &MODULES,
        programs: &["fence_virt", "fence_virtd", "perl"],
        libraries: STOCK_MODULES.map(PathBuf::from).to_vec(),
        files: vec![
            ("/ask.sh", SCRIPT.to_owned()),
            ("/crowd.sh", CROWD_SCRIPT.to_owned()),
            ("/crowd.pl", CROWD.to_owned()),
            ("/plugin.sh", PLUGIN_SCRIPT.to_owned()),
            ("/node.xml", node(&domains)),
            ("/key", "the key of this test, of some length".to_owned()),
            ("/other", "a key that the servers do not have".to_owned()),
            ("/all.conf", config("")),
            ("/member.conf", of_group("ip = \"1\";")),
            ("/stranger.conf", of_group("ip = \"3\";")),
            ("/from.conf", of_group("from = \"vm-on\";")),
        ],
        copies: vec![(tools::workspace().join("dist/stonith/external/fence-xdp"), "/plugin")],
    };
    let steps = [
        step("stock-all", "fence_virtd", "all", &ALL),
        step("ours-all", "fence-daemon", "all", &ALL),
        step("stock-member", "fence_virtd", "member", &GROUPED),
        step("ours-member", "fence-daemon", "member", &GROUPED),
        step("stock-stranger", "fence_virtd", "stranger", &GROUPED),
        step("ours-stranger", "fence-daemon", "stranger", &GROUPED),
        step("ours-from", "fence-daemon", "from", &GROUPED),
        Step { name: "crowd", command: "sh /crowd.sh".to_owned() },
        Step { name: "plugin", command: "sh /plugin.sh".to_owned() },
    ];
    let scratch = tempfile::tempdir()?;
    let initrd = scratch.path().join("initrd");
    std::fs::write(&initrd, guest::initrd(&kernel, &programs, &extra, &steps, scratch.path())?)?;
    let done = guest::run(&kernel, &initrd, &steps)?;
    for (step, done) in steps.iter().zip(&done) {
        ensure!(done.code == 0, "{}: {:#?}", step.name, done.output);
    }
    let [stock_all, ours_all, stock_member, ours_member, stock_stranger, ours_stranger, ours_from, crowd, plugin] =
        done.as_slice()
    else {
        anyhow::bail!("{} steps", done.len());
    };
    for (stock, ours) in [(stock_all, ours_all), (stock_member, ours_member), (stock_stranger, ours_stranger)] {
        ensure!(said(stock) == said(ours), "stock {:#?}\nours {:#?}\n{:#?}", said(stock), said(ours), ours.output);
    }
    let codes = |done: &Done| {
        said(done).iter().map(|(_, answer)| answer.split(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    ensure!(codes(ours_all) == ["0", "0", "2", "2", "0", "0", "2", "0", "0", "1", "1", "1", "0"], "{ours_all:#?}");
    ensure!(codes(ours_member) == ["0", "3", "0", "0"], "{ours_member:#?}");
    ensure!(codes(ours_stranger) == ["3", "3", "0", "0"], "{ours_stranger:#?}");
    // The client is CID 1 there, which is no machine's.
    ensure!(codes(ours_from) == ["3", "3", "0", "0"], "{ours_from:#?}");
    let logged = ours_member.output.iter().any(|line| line.contains("op=off") && line.contains("source=CID 1"));
    ensure!(logged, "the log does not say who asked: {:#?}", ours_member.output);
    for (asked, answer) in said(ours_all) {
        eprintln!("{asked}: {answer}");
    }
    ensure!(codes(crowd) == ["0"; 12], "{crowd:#?}");
    let counted = crowd.output.iter().find_map(|line| line.split_once("\"drop_length\":")?.1.parse::<u32>().ok());
    ensure!(counted >= Some(500), "too few silent connections were closed: {crowd:#?}");
    ensure!(codes(plugin) == ["0", "0", "0", "0", "1", "1"], "{plugin:#?}");
    let killed = |line: &&String| line.contains("op=off") && line.contains("reply=success");
    ensure!(plugin.output.iter().filter(killed).count() == 1, "{plugin:#?}");
    Ok(())
}
