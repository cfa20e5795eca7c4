//! `-c` for each listener: its questions, and which options are for it.

use std::path::Path;

use fence_config::{Listener, SerialMode, TcpAddress};

use crate::configure::{done, file};
use crate::program::{Dir, parse, run};

/// The questions and their order are fence_virtd's. vsock has none there.
#[test]
fn each_listener_has_its_questions() {
    let dir = Dir::new();
    let key = dir.write("key", "x");
    let key = key.display();
    let in_order = |said: &str, labels: &[&str]| {
        let places: Vec<_> =
            labels.iter().map(|label| said.find(label).unwrap_or_else(|| panic!("{label}: {said}"))).collect();
        assert!(places.is_sorted(), "{places:?}: {said}");
    };
    let conf = dir.path("tcp");
    let asked = run(&["-c"], &conf, &format!("y\n\ntcp\n225.0.0.12\n192.168.122.1\n1230\n{key}\n\n\ny\n"));
    done(&asked);
    assert!(asked.stdout.contains("Not taken: no connection arrives at the multicast address"), "{}", asked.stdout);
    in_order(
        &asked.stdout,
        &["TCP Listen IP Address [0.0.0.0]", "TCP Listen Port [1229]", "Key File [", "Backend module ["],
    );
    assert!(!asked.stdout.contains("Multicast IP"), "{}", asked.stdout);
    let (config, _) = parse(&file(&conf));
    let tcp = config.tcps().next().unwrap();
    assert_eq!((tcp.address.to_string().as_str(), tcp.port), ("192.168.122.1", 1230));
    assert!(file(&conf).contains("\t\tfamily = \"ipv4\";\n"), "stock servers infer no family");

    let conf = dir.path("serial");
    let answers = "y\n\nserial\n\nnone\n/run/lines\nvmchannel\n\n\n";
    let asked = run(&["-c"], &conf, &format!("{answers}n\ny\n"));
    assert_eq!((asked.code, conf.exists()), (Some(255), false), "{}", asked.stdout);
    assert!(asked.stderr.contains("serial needs `groups`"), "{}", asked.stderr);
    let asked = run(&["-c"], &conf, &format!("{answers}y\ny\n"));
    done(&asked);
    let labels = [
        "Libvirt URI [none]",
        "Socket directory [/run/fence]",
        "Mode (serial or vmchannel) [serial]",
        "Backend module [",
    ];
    in_order(&asked.stdout, &labels);
    let (config, warnings) = parse(&file(&conf));
    let Some(Listener::Serial(serial)) = config.listeners.first() else { panic!("{config:?}") };
    assert_eq!(
        (serial.path.as_path(), serial.mode, serial.everyone),
        (Path::new("/run/lines"), SerialMode::Vmchannel, true)
    );
    assert!(warnings.is_empty() && !asked.stdout.contains("key file"), "{}", asked.stdout);
    // Groups say it as well.
    let groups = "groups { group { from = \"a\"; uuid = \"b\"; } }";
    let conf = dir.write("grouped", groups);
    done(&run(&["-c"], &conf, "\nserial\nqemu:///system\n\n\n\n\ny\n"));
    let (config, _) = parse(&file(&conf));
    assert!(matches!(&config.listeners[..], [Listener::Serial(serial)] if !serial.everyone && serial.uri.is_some()));

    let conf = dir.path("several");
    let asked = run(&["-c"], &conf, &format!("y\n\nvsock, multicast\n\n\nvirbr0\n{key}\n1231\n\n\n\ny\n"));
    done(&asked);
    in_order(&asked.stdout, &["Multicast IP Address [", "Interface [", "VSOCK Listen Port [1229]"]);
    let (config, warnings) = parse(&file(&conf));
    let ports: Vec<_> = config.listeners.iter().map(|listener| (listener.label(), listener.key_files())).collect();
    assert!(
        ports.len() == 2 && ports[0].1 == ports[1].1 && warnings.is_empty(),
        "{ports:?} {}",
        warnings.render(false)
    );
    assert!(matches!(&config.listeners[1], Listener::Vsock(vsock) if vsock.port == 1231), "{}", file(&conf));
}

#[test]
fn options_are_for_the_listener_that_has_such_a_key() {
    let dir = Dir::new();
    let key = dir.write("key", "x").display().to_string();
    let configured = |name: &str, options: &str| {
        let conf = dir.path(name);
        let arguments: Vec<_> = ["-c", "--yes"].into_iter().chain(options.split(' ')).collect();
        done(&run(&arguments, &conf, ""));
        parse(&file(&conf)).0.listeners
    };
    let tcp = format!(
        "--listener tcp --address fencing.example --family ipv6 --port 7 --hash sha512 --interface virbr0 --key-file {key}"
    );
    let [Listener::Tcp(tcp)] = &configured("tcp", &tcp)[..] else { panic!("no tcp") };
    let name = TcpAddress::Name { name: "fencing.example".to_owned(), is_v4: Some(false) };
    assert_eq!(
        (&tcp.address, tcp.port, tcp.hash.name(), tcp.interface.as_deref()),
        (&name, 7, "sha512", Some("virbr0"))
    );
    let serial = "--listener serial --path /run/lines --mode vmchannel --permit everyone";
    assert!(matches!(&configured("serial", serial)[..], [Listener::Serial(serial)] if serial.everyone));
    let both = format!("--listener vsock,serial --port 9 --path /run/lines --permit everyone --key-file {key}");
    let [Listener::Vsock(vsock), Listener::Serial(serial)] = &configured("both", &both)[..] else { panic!("not both") };
    assert_eq!((vsock.port, serial.path.as_path()), (9, Path::new("/run/lines")));
    for (options, why) in [
        ("--listener serial --path lines --permit everyone", "--path: `path` of serial must begin with `/`"),
        ("--listener serial --port 9", "--port: no chosen listener has such a key"),
        ("--path /run/lines", "--path: no chosen listener has such a key"),
        ("--listener tcp --auth sha1", "--auth: `auth` can only be \"sha256\""),
        ("--listener nonsense", "--listener: there is no listener \"nonsense\""),
        ("--listener serial --path /run/lines", "serial needs `groups`"),
    ] {
        let arguments: Vec<_> = ["-c", "--yes"].into_iter().chain(options.split(' ')).collect();
        let refused = run(&arguments, &dir.path("none"), "");
        assert!(refused.code == Some(255) && refused.stderr.contains(why), "{options}: {}", refused.stderr);
        assert!(!dir.path("none").exists());
    }
}
