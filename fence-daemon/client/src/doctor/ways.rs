//! The ways in beside multicast that a guest could use: tcp, and vsock and a serial line where they
//! are asked for. Each is tried by a real request of `fence_virt`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fence_common::hash::HashKind;
use fence_common::words::counted;

use super::exchange::{self, Settings};
use super::finding::{Finding, State};
use super::program::{self, Said, Silence};
use super::{Options, firewall, guest, line, port, sight};

/// The name of the check of tcp.
const TCP: &str = "tcp";
/// The name of the check of vsock.
const VSOCK: &str = "vsock";
/// The name of the summary.
const CHECK: &str = "ways";

/// The end of a vsock in a guest.
const DEVICE: &str = "/dev/vsock";
/// How long `fence_virt` takes to connect at most.
const CONNECT: Duration = Duration::from_secs(3);
/// How long `fence_virt` may take in all: each of its waits takes up to [`exchange::WAIT`].
const LIMIT: Duration = Duration::from_secs(40);
/// The kernel's flag of a route that leads nowhere.
const RTF_REJECT: u32 = 0x200;
/// What only multicast needs.
const OF_MULTICAST: [&str; 4] = [guest::ROUTE, port::CHECK, firewall::CHECK, exchange::CHECK];

/// A way that is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WayIn {
    /// To this address.
    Tcp {
        /// Where the daemon may listen.
        place: SocketAddr,
        /// Whether it is only the gateway, which may be another host than the hypervisor.
        guessed: bool,
    },
    /// To the host with this CID.
    Vsock(u32),
    /// By this serial port.
    Serial(PathBuf),
}

impl WayIn {
    fn name(&self) -> String {
        match self {
            Self::Tcp { place, guessed: false } => format!("tcp at {place}"),
            Self::Tcp { place, guessed: true } => format!("tcp at {place}, the gateway"),
            Self::Vsock(cid) => format!("vsock to CID {cid}"),
            Self::Serial(device) => format!("serial by {}", device.display()),
        }
    }

    fn check(&self) -> &'static str {
        match self {
            Self::Tcp { .. } => TCP,
            Self::Vsock(_) => VSOCK,
            Self::Serial(_) => line::CHECK,
        }
    }

    /// The request as arguments of `fence_virt`. The digest of the exam is always SHA-256 there.
    fn arguments(&self, settings: &Settings) -> Vec<String> {
        let with_key = || Settings { auth: HashKind::Sha256, ..settings.clone() }.common();
        let (mut all, way) = match self {
            Self::Tcp { place, .. } => {
                (with_key(), vec!["-T".to_owned(), place.ip().to_string(), "-p".to_owned(), place.port().to_string()])
            }
            // In one word: `fence_virt` takes `-S 3` for CID 2.
            Self::Vsock(cid) => (with_key(), vec![format!("-S{cid}"), "-p".to_owned(), settings.port.to_string()]),
            Self::Serial(device) => (Settings::list(), vec!["-D".to_owned(), device.to_string_lossy().into_owned()]),
        };
        all.extend(way);
        all
    }

    fn command(&self, settings: &Settings) -> String {
        format!("fence_virt {}", self.arguments(settings).join(" "))
    }
}

/// The ways to try: what the options name, or else the gateways.
#[must_use]
pub fn chosen(options: &Options, port: u16) -> Vec<WayIn> {
    let Options { tcp, vsock, serial, .. } = options;
    let named =
        tcp.iter().map(|&(ip, own)| WayIn::Tcp { place: SocketAddr::new(ip, own.unwrap_or(port)), guessed: false });
    let guessed = if tcp.is_empty() { gateways() } else { Vec::new() };
    let guessed = guessed.into_iter().map(|ip| WayIn::Tcp { place: SocketAddr::new(ip, port), guessed: true });
    let vouched = vsock.map(WayIn::Vsock).into_iter().chain(serial.clone().map(WayIn::Serial));
    named.chain(guessed).chain(vouched).collect()
}

/// The gateways of the default routes, of each family one.
fn gateways() -> Vec<IpAddr> {
    let text = |path| sight::text(path).unwrap_or_default();
    let (v4, v6) = (gateway(&text("/proc/net/route")), gateway_v6(&text("/proc/net/ipv6_route")));
    v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)).collect()
}

/// The gateway of the default route, by the kernel's table of IPv4 routes.
fn gateway(routes: &str) -> Option<Ipv4Addr> {
    let number = |word: Option<&&str>| u32::from_str_radix(word?, 16).ok();
    routes.lines().skip(1).find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (to, through, mask) = (number(words.get(1))?, number(words.get(2))?, number(words.get(7))?);
        // Addresses stand there as the bytes lie in memory.
        (to == 0 && mask == 0 && through != 0).then(|| Ipv4Addr::from(through.to_ne_bytes()))
    })
}

/// The gateway of the preferred default route, by the kernel's table of IPv6 routes.
fn gateway_v6(routes: &str) -> Option<Ipv6Addr> {
    let address = |word: &str| u128::from_str_radix(word, 16).map(Ipv6Addr::from_bits);
    let number = |word: &str| u32::from_str_radix(word, 16);
    let gateway = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [to, bits, _, _, through, metric, _, _, flags, ..] = words.as_slice() else { return None };
        let (to, bits, through) = (address(to).ok()?, number(bits).ok()?, address(through).ok()?);
        let is_default = to.is_unspecified() && bits == 0 && !through.is_unspecified();
        (is_default && number(flags).ok()? & RTF_REJECT == 0).then_some((number(metric).ok()?, through))
    };
    routes.lines().filter_map(gateway).min().map(|(_, through)| through)
}

/// Tries each way, and judges all of them together with `multicast`, the findings about multicast.
#[must_use]
pub fn check(ways: &[WayIn], settings: &Settings, multicast: &mut [Finding]) -> Vec<Finding> {
    let outcome = multicast.iter().find(|finding| finding.check == exchange::CHECK);
    // Without the client there is nothing to try.
    let Some(by_multicast) = outcome.map(|finding| finding.state == State::Ok) else { return Vec::new() };
    let mut tried = vec![("multicast".to_owned(), by_multicast)];
    let (mut findings, mut unanswered_guesses, mut own) = (Vec::<Finding>::new(), Vec::new(), None);
    let mut needs_key = by_multicast;
    for way in ways {
        let (finding, list) = ask(way, settings, Path::new(DEVICE));
        needs_key |= list.is_some() && !matches!(way, WayIn::Serial(_));
        if list.is_none() && matches!(way, WayIn::Tcp { guessed: true, .. }) {
            unanswered_guesses.push(findings.len());
        }
        tried.push((way.name(), list.is_some()));
        findings.push(finding);
        if let WayIn::Serial(device) = way {
            findings.extend(line::others(device, &line::Other::of(device), list.is_some()));
        }
        own = own.or(list);
    }
    // A gateway may be another host, and one way is enough.
    let state = if by_multicast || own.is_some() { State::Ok } else { State::Warning };
    for number in unanswered_guesses {
        if let Some(finding) = findings.get_mut(number) {
            finding.state = state;
        }
    }
    if let (false, Some(list)) = (by_multicast, own) {
        findings.push(exchange::own_name(&list));
        excuse(multicast, needs_key);
    }
    findings.push(summary(&tried));
    findings
}

/// What only multicast lacks is no failure where another way is answered. Nor is a missing key
/// where a serial line is, and nothing else.
fn excuse(multicast: &mut [Finding], needs_key: bool) {
    for finding in multicast.iter_mut().filter(|finding| finding.state == State::Wrong) {
        let why = match finding.check {
            guest::KEY if !needs_key => " (the serial line that is answered needs none)",
            check if OF_MULTICAST.contains(&check) => " (by multicast; another way is answered)",
            _ => continue,
        };
        finding.state = State::Warning;
        finding.seen.push_str(why);
    }
}

fn summary(tried: &[(String, bool)]) -> Finding {
    let of = |wanted: bool| {
        let names = tried.iter().filter(|(_, answered)| *answered == wanted).map(|(name, _)| name.as_str());
        names.collect::<Vec<_>>().join("; ")
    };
    let (answered, silent) = (of(true), of(false));
    if answered.is_empty() {
        let remedy = "this guest cannot fence: one of these ways must be answered, and above stands what each of them lacks \
                      (docs/guide/ways-in.md compares them; --vsock and --serial try two that need no network)";
        return Finding::wrong(CHECK, format!("nothing answers: {silent}"), remedy);
    }
    let silent = if silent.is_empty() { String::new() } else { format!("; not answered: {silent}") };
    Finding::ok(CHECK, format!("answered: {answered}{silent}"))
}

/// Asks by one way. With the finding comes the list, where there was an answer.
fn ask(way: &WayIn, settings: &Settings, device: &Path) -> (Finding, Option<String>) {
    if let WayIn::Serial(device) = way
        && let Some(finding) = line::obstacle(device)
    {
        return (finding, None);
    }
    if let WayIn::Tcp { place, .. } = way
        && is_of_a_link(place.ip())
    {
        let remedy = "fence_virt takes no link-local address: name another address of the hypervisor with --tcp";
        return (Finding::wrong(TCP, format!("{}: not asked", way.name()), remedy), None);
    }
    if let (WayIn::Vsock(_), false) = (way, device.exists()) {
        let remedy = "give this guest's domain a device `<vsock model=\"virtio\"><cid auto=\"yes\"/></vsock>` on the hypervisor, and load \
                      the guest's driver";
        let finding = Finding::wrong(VSOCK, format!("there is no {}", device.display()), remedy);
        return (finding.command("modprobe vmw_vsock_virtio_transport"), None);
    }
    let mut arguments = way.arguments(settings);
    // The messages of fence_virt tell how far it came.
    arguments.push("-ddd".to_owned());
    let begun = Instant::now();
    match program::run("fence_virt", &arguments, LIMIT) {
        Ok(said) if said.code == Some(0) => {
            let (millis, domains) = (begun.elapsed().as_millis(), counted(exchange::domains(&said.stdout), "domain"));
            let seen = format!("{}: answered within {millis} ms, with a list of {domains}", way.name());
            (Finding::ok(way.check(), seen), Some(said.stdout))
        }
        Ok(said) => (failed(way, &said, settings, reach), None),
        Err(error @ Silence::Missing(_)) => {
            let finding = Finding::wrong(way.check(), error.to_string(), "install it (Debian: fence-virt)");
            (finding.command("apt-get install fence-virt"), None)
        }
        Err(error) => {
            let remedy = "the daemon took the request and did not answer in time: its own `status` says why";
            (Finding::wrong(way.check(), error.to_string(), remedy).command(way.command(settings)), None)
        }
    }
}

/// Whether an address belongs to one link, so that it is of no use without the link's name.
fn is_of_a_link(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Connects and hangs up.
fn reach(place: SocketAddr) -> io::Result<()> {
    TcpStream::connect_timeout(&place, CONNECT).map(drop)
}

/// Why there was no answer. `fence_virt` does not say it truly, so `reach` connects once more.
fn failed(way: &WayIn, said: &Said, settings: &Settings, reach: impl FnOnce(SocketAddr) -> io::Result<()>) -> Finding {
    if let WayIn::Serial(device) = way {
        return line::failed(device, said, way.command(settings));
    }
    let words = format!("{}{}", said.stdout, said.stderr);
    let (check, name, hash) = (way.check(), way.name(), settings.hash.name());
    if words.contains("hallenge") {
        let remedy = format!(
            "what listens there rejects the request: it is no fencing daemon, its key is another one (compare fingerprints with \
             `fence-daemon doctor` there), or it demands a stronger digest than {hash}"
        );
        let finding = Finding::wrong(check, format!("{name}: connected, and closed without an answer"), remedy);
        return finding.command(way.command(settings) + " -ddd");
    }
    let &WayIn::Tcp { place, .. } = way else {
        let remedy = "no daemon listens to vsock on the host: choose the listener `vsock` in its fence_virt.conf";
        return Finding::wrong(check, format!("{name}: not connected"), remedy).command(way.command(settings));
    };
    let (why, remedy) = match reach(place) {
        Ok(()) => (
            "no answer, although one can connect".to_owned(),
            "ask again, and see what the daemon's log says".to_owned(),
        ),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => (
            "nobody listens there".to_owned(),
            format!(
                "to serve this guest by tcp, write `listener = \"multicast,tcp\"` and, in section `tcp`, `address = \"{}\"` into the \
                 hypervisor's fence_virt.conf, and restart its daemon",
                place.ip()
            ),
        ),
        Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => (
            format!("no answer to a connection within {} s", CONNECT.as_secs()),
            format!(
                "a firewall drops it, or there is no such host: let TCP port {} in on the hypervisor, and out here",
                place.port()
            ),
        ),
        Err(error) => (
            format!("no connection: {error}"),
            format!("there is no way to it from here: check the address, and `ip route get {}`", place.ip()),
        ),
    };
    Finding::wrong(check, format!("{name}: {why}"), remedy).command(way.command(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: WayIn =
        WayIn::Tcp { place: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 168, 122, 1)), 1229), guessed: false };

    fn settings() -> Settings {
        let (hash, auth) = (HashKind::Sha512, HashKind::Sha1);
        Settings { group: IpAddr::from([225, 0, 0, 12]), port: 7, hash, auth, key_file: "/k".into() }
    }

    #[test]
    fn the_client_is_called_as_it_understands_it() {
        let said = HERE.command(&settings());
        assert_eq!(said, "fence_virt -o list -t 5 -k /k -c sha512 -C sha256 -T 192.168.122.1 -p 1229");
        // The CID and its option are one word.
        let said = WayIn::Vsock(3).command(&settings());
        assert_eq!(said, "fence_virt -o list -t 5 -k /k -c sha512 -C sha256 -S3 -p 7");
        let said = WayIn::Serial("/dev/ttyS1".into()).command(&settings());
        assert_eq!(said, "fence_virt -o list -t 5 -D /dev/ttyS1");
    }

    #[test]
    fn the_gateway_is_a_guess_that_a_named_address_replaces() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t007AA8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                     eth0\t00000000\t017AA8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let swap = cfg!(target_endian = "little");
        assert_eq!(gateway(table), swap.then_some(Ipv4Addr::new(192, 168, 122, 1)));
        assert_eq!(gateway(""), None);
        let zero = "0".repeat(32);
        let of = |through: &str, metric: &str, flags: &str| {
            format!("{zero} 00 {zero} 00 {through} {metric} 00000002 00000000 {flags} eth0\n")
        };
        let near = of(&zero, "00000100", "00000001").replacen("00 ", "40 ", 1).replacen("00", "fd", 1);
        let (one, other) = ("fd000000000000000000000000000001", "fd000000000000000000000000000002");
        let rejected = of(other, "00000001", "00000203");
        let routes = [
            near,
            rejected,
            of(&zero, "00000002", "00000001"),
            of(other, "00000400", "00000003"),
            of(one, "00000100", "00450003"),
        ];
        assert_eq!(gateway_v6(&routes.concat()), Some("fd00::1".parse().unwrap()));
        assert_eq!(gateway_v6(&routes[..3].concat()), None);
        assert_eq!(gateway_v6("nonsense\n"), None);
        let ip = IpAddr::from([192, 0, 2, 1]);
        let named = |port| WayIn::Tcp { place: SocketAddr::new(ip, port), guessed: false };
        let tcp = vec![(ip, None), (ip, Some(5))];
        assert_eq!(chosen(&Options { tcp, ..Options::default() }, 7), [named(7), named(5)]);
        let options =
            Options { tcp: vec![(ip, None)], vsock: Some(2), serial: Some(DEVICE.into()), ..Options::default() };
        assert_eq!(chosen(&options, 7), [named(7), WayIn::Vsock(2), WayIn::Serial(DEVICE.into())]);
    }

    #[test]
    fn each_failure_has_its_own_remedy() {
        let cannot = Said { stdout: "Unable to connect to fence_virtd host\n".to_owned(), ..Said::default() };
        let why = |kind: Option<io::ErrorKind>| {
            let reach = |_| kind.map_or(Ok(()), |kind| Err(io::Error::from(kind)));
            let finding = failed(&HERE, &cannot, &settings(), reach);
            format!("{} {}", finding.seen, finding.remedy.unwrap_or_default())
        };
        assert!(why(Some(io::ErrorKind::ConnectionRefused)).contains("address = \"192.168.122.1\""));
        assert!(why(Some(io::ErrorKind::TimedOut)).contains("let TCP port 1229 in"));
        assert!(why(Some(io::ErrorKind::NetworkUnreachable)).contains("ip route get 192.168.122.1"));
        assert!(why(None).contains("although one can connect"));
        let closed = Said { stdout: "Issuing TCP challenge\n".to_owned(), ..Said::default() };
        let finding = failed(&HERE, &closed, &settings(), |_| Ok(()));
        assert!(finding.seen.contains("closed without an answer") && finding.state == State::Wrong);
    }

    #[test]
    fn a_link_local_gateway_is_named_and_not_asked() {
        let place = "[fe80::1]:1229".parse().unwrap();
        let (finding, list) = ask(&WayIn::Tcp { place, guessed: true }, &settings(), Path::new(DEVICE));
        assert_eq!((finding.state, list), (State::Wrong, None));
        assert!(
            finding.seen.contains("[fe80::1]:1229, the gateway: not asked")
                && finding.remedy.unwrap().contains("--tcp")
        );
    }

    #[test]
    fn a_guest_without_vsock_asks_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let (finding, list) = ask(&WayIn::Vsock(2), &settings(), &folder.path().join("vsock"));
        assert_eq!((finding.state, list), (State::Wrong, None));
        assert!(finding.seen.contains("there is no ") && finding.commands == ["modprobe vmw_vsock_virtio_transport"]);
    }

    #[test]
    fn one_way_that_is_answered_is_enough() {
        let told = summary(&[("multicast".into(), false), ("tcp at x".into(), true)]);
        assert_eq!((told.state, told.seen.as_str()), (State::Ok, "answered: tcp at x; not answered: multicast"));
        assert_eq!(summary(&[("multicast".into(), false)]).state, State::Wrong);
        let mut findings = [Finding::wrong(exchange::CHECK, "no callback", "x"), Finding::wrong("key", "none", "x")];
        excuse(&mut findings, true);
        assert_eq!(findings.clone().map(|finding| finding.state), [State::Warning, State::Wrong]);
        // A serial line has no key.
        excuse(&mut findings, false);
        assert_eq!(findings.map(|finding| finding.state), [State::Warning, State::Warning]);
    }
}
