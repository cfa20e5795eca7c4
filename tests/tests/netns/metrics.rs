//! The metrics: read by a real Prometheus, checked by its tools, and of no harm to a fence.

mod panels;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use fence_lab::process::{Process, poll_until, run};
use fence_lab::server::{START_LIMIT, Server, Which};
use fence_lab::tools;
use serde_json::Value;

use self::panels::Panel;
use crate::bench::Bench;

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Has the picture of the dashboard written to docs, from two minutes of requests, when it is set.
const WRITE_DOCS: &str = "FENCE_WRITE_DOCS";

/// The socket of the tests that read the page themselves.
const SOCKET: &str = "/run/fence-xdp/metrics.sock";

/// A daemon that shows its metrics as these keys say.
fn serve(bench: &Bench, keys: &str) -> Result<Server> {
    let text = bench.config("auto").render().replacen('{', &format!("{{\n\tmetrics {{ {keys} }}"), 1);
    let file = bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, 1229, &[])?;
    server.wait_ready(START_LIMIT)?;
    Ok(server)
}

fn connect(bench: &Bench) -> Result<UnixStream> {
    let stream = UnixStream::connect(bench.hypervisor.outside(SOCKET)).context("connecting to the metrics")?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// The answer to a request with these lines, up to the end of the connection: its head, and its
/// body.
fn ask(bench: &Bench, lines: &[&str]) -> Result<(String, String)> {
    let mut stream = connect(bench)?;
    let request = format!("{}\r\nHost: lab\r\n\r\n", lines.join("\r\n"));
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
    Ok((head.to_owned(), body.to_owned()))
}

/// A file of `dist`.
fn dist(file: &str) -> Result<String> {
    let path = tools::workspace().join("dist").join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

#[test]
fn the_page_is_right_in_both_formats_by_prometheus_own_check() -> Result<()> {
    let bench = Bench::new()?;
    let server = serve(&bench, "path = \"/run/fence-xdp/metrics.sock\";")?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    bench.expect_via(&server, &bench.about_domain("status"), 2, "kernel")?;

    let (head, page) = poll_until("the requests to be counted", LIMIT, || {
        let answer = ask(&bench, &["GET /metrics HTTP/1.1"])?;
        let counted = "action=\"status\",result=\"off\"} 1\n";
        Ok(answer.1.contains(counted).then_some(answer))
    })?;
    ensure!(head.starts_with("HTTP/1.1 200 OK") && head.contains("text/plain; version=0.0.4"), "{head}");
    for line in [
        "fence_xdp_requests_total{listener=\"multicast\",name=\"\",action=\"off\",result=\"success\"} 1",
        "fence_xdp_health{state=\"serving\"} 1.0",
        "fence_xdp_listener_up{listener=\"multicast\",name=\"\"} 1.0",
        "fence_xdp_domains{uri=\"test:///default\",state=\"shut_off\"} 1.0",
        "fence_xdp_request_duration_seconds_count{action=\"off\",step=\"dead\"} 1",
    ] {
        ensure!(page.lines().any(|there| there == line), "no {line} in\n{page}");
    }
    ensure!(page.contains("fence_xdp_program_attached{") && page.contains("mode=\"generic\"} 1.0"), "{page}");

    let file = bench.hypervisor.write("page", page.as_bytes())?;
    let check = format!("promtool check metrics < {file}");
    let checked = bench.hypervisor.space().must("sh", &["-c", &check])?;
    ensure!(checked.stdout.is_empty() && checked.stderr.is_empty(), "{}{}", checked.stdout, checked.stderr);

    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    let (head, page) = ask(&bench, &["GET /metrics HTTP/1.1", accept])?;
    ensure!(
        head.contains("application/openmetrics-text; version=1.0.0") && page.ends_with("# EOF\n"),
        "{head}\n{page}"
    );
    for (request, status) in [
        ("HEAD /metrics HTTP/1.1", "200"),
        ("GET / HTTP/1.1", "404"),
        ("POST /metrics HTTP/1.1", "405"),
        ("nonsense", "400"),
    ] {
        let (head, _) = ask(&bench, &[request])?;
        ensure!(head.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {head}");
    }
    Ok(())
}

#[test]
fn without_the_section_nothing_listens_for_prometheus() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("off"))?;
    for table in ["tcp", "tcp6"] {
        let listening = bench.hypervisor.proc_net(table)?;
        ensure!(!listening.lines().any(|line| line.contains(" 0A ")), "{listening}");
    }
    Ok(())
}

/// What a dashboard's query is with Grafana's variables filled in.
fn filled(query: &str) -> String {
    query.replace("$__rate_interval", "5m").replace("$instance", ".*")
}

#[test]
fn a_real_prometheus_answers_the_dashboards_queries_and_takes_the_rules() -> Result<()> {
    let bench = Bench::new()?;
    let server = serve(&bench, "address = \"127.0.0.1\"; port = \"12291\";")?;
    let rules = bench.hypervisor.write("fence-xdp.rules.yml", dist("prometheus/fence-xdp.rules.yml")?.as_bytes())?;
    let config = format!(
        "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [\"{rules}\"]\nscrape_configs:\n\
         - job_name: fence-xdp\n  static_configs: [{{ targets: [\"127.0.0.1:12291\"], labels: {{ instance: host1 }} }}]\n"
    );
    let config = bench.hypervisor.write("prometheus.yml", config.as_bytes())?;
    let mut command = Command::new(tools::find("prometheus")?);
    command.args([
        &format!("--config.file={config}"),
        &format!("--storage.tsdb.path={}", bench.hypervisor.path("tsdb")),
        "--web.listen-address=127.0.0.1:9090",
    ]);
    let prometheus = Process::start(bench.hypervisor.space(), &mut command)?;
    let query = |text: &str| {
        let mut command = Command::new(tools::find("promtool")?);
        command.args(["query", "instant", "http://127.0.0.1:9090", text]);
        run(bench.hypervisor.space(), &mut command, LIMIT)
    };
    let answered = |text: &str, is_enough: &dyn Fn(&str) -> bool| {
        poll_until(text, LIMIT, || {
            let answer = query(text)?;
            Ok((answer.code == Some(0) && is_enough(&answer.stdout)).then_some(answer.stdout))
        })
        .with_context(|| format!("{}\n{}", prometheus.stderr().text(), server.log()))
    };
    answered("up{job=\"fence-xdp\"} == 1", &|found| !found.trim().is_empty())?;
    let begun = SystemTime::now();
    let is_for_docs = std::env::var_os(WRITE_DOCS).is_some();
    loop {
        bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
        bench.expect_via(&server, &bench.about_domain("on"), 0, "kernel")?;
        bench.expect(&server, bench.guest.space(), &bench.client("off").domain("nobody"), 1)?;
        // The picture of the docs has something to show.
        if !is_for_docs || begun.elapsed()? > Duration::from_secs(120) {
            break;
        }
        bench.expect_via(&server, &bench.about_domain("reboot"), 0, "kernel")?;
    }

    let dashboard: Value = serde_json::from_str(&dist("grafana/fence-xdp.json")?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let (mut tried, mut drawn) = (0, Vec::new());
    for panel in panels {
        let title = panel["title"].as_str().unwrap_or_default();
        let mut lines = Vec::new();
        for target in panel["targets"].as_array().context("no targets")? {
            let text = filled(target["expr"].as_str().context("no query")?);
            // Only with the backend cpg.
            let is_empty = title == "Cluster";
            answered(&text, &|found| is_empty || !found.trim().is_empty()).with_context(|| title.to_owned())?;
            tried += 1;

            let mut command = Command::new(tools::find("promtool")?);
            command.args(["query", "--format=json"]);
            if target["instant"] == true {
                command.args(["instant", "http://127.0.0.1:9090", &text]);
            } else {
                let begun = begun.duration_since(SystemTime::UNIX_EPOCH)?.as_secs().to_string();
                command.args(["range", "--step=1s", &format!("--start={begun}"), "http://127.0.0.1:9090"]);
                command.arg(text.replace("[5m]", "[15s]"));
            }
            let answer = run(bench.hypervisor.space(), &mut command, LIMIT)?;
            let legend = target["legendFormat"].as_str().unwrap_or_default();
            lines.extend(panels::lines(&answer.stdout)?.into_iter().map(|line| (legend, line)));
        }
        drawn.push(Panel { json: panel, lines });
    }
    ensure!(tried > 15, "only {tried} queries");
    let picture = panels::picture(&drawn)?;
    // A few seconds have no rates.
    let lines = picture.matches("<polyline").count();
    ensure!(lines >= if is_for_docs { 15 } else { 5 } && picture.contains(">up<"), "{lines}: {picture}");
    if is_for_docs {
        std::fs::write(tools::workspace().join("docs/reference/metrics.svg"), picture)?;
    }
    // The failed `off` is an alert, and all other alerts are calm.
    let alerts = answered("ALERTS{alertstate=\"firing\"}", &|found| found.contains("FenceFailed"))?;
    ensure!(alerts.lines().filter(|line| line.contains("alertname")).count() == 1, "{alerts}");
    Ok(())
}

#[test]
fn the_alerts_do_what_their_tests_say_and_each_is_documented() -> Result<()> {
    let directory = tools::workspace().join("dist/prometheus");
    tools::output("promtool", &["check", "rules", "fence-xdp.rules.yml"], &directory)?;
    tools::output("promtool", &["test", "rules", "fence-xdp.test.yml"], &directory)?;
    let (rules, tests) = (dist("prometheus/fence-xdp.rules.yml")?, dist("prometheus/fence-xdp.test.yml")?);
    let page = std::fs::read_to_string(tools::workspace().join("docs/reference/metrics.md"))?;
    let set = |text: &str, before: &str, end: char| -> BTreeSet<String> {
        let found = text.lines().filter_map(|line| line.trim().strip_prefix(before)?.split(end).next());
        found.map(str::to_owned).collect()
    };
    let alerts = set(&rules, "- alert: ", ' ');
    ensure!(alerts == set(&tests, "alertname: ", ' '), "an alert has no test");
    ensure!(alerts == set(&page, "| `Fence", '`').iter().map(|name| format!("Fence{name}")).collect(), "{alerts:?}");
    // Each name in rules and dashboard is one that the page documents.
    let words = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let own = words.filter(|word| word.starts_with("fence_xdp_"));
        own.map(|word| word.trim_end_matches("_bucket").trim_end_matches("_sum").trim_end_matches("_count").to_owned())
            .collect()
    };
    let documented = words(&page);
    for text in [rules, dist("grafana/fence-xdp.json")?] {
        let unknown: Vec<_> = words(&text).difference(&documented).cloned().collect();
        ensure!(unknown.is_empty(), "not documented: {unknown:?}");
    }
    Ok(())
}

#[test]
fn the_dashboard_has_the_form_that_grafana_reads() -> Result<()> {
    let schema = jsonschema::validator_for(&serde_json::from_str(include_str!("metrics/dashboard.schema.json"))?)?;
    let dashboard: Value = serde_json::from_str(&dist("grafana/fence-xdp.json")?)?;
    let wrong: Vec<String> =
        schema.iter_errors(&dashboard).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(wrong.is_empty(), "{wrong:?}");
    let mut broken = dashboard.clone();
    broken["panels"][0]["gridPos"]["w"] = 25.into();
    ensure!(!schema.is_valid(&broken), "the schema permits anything");
    // No two panels are at one place.
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    let mut cells = BTreeSet::new();
    for panel in panels {
        let at = |name: &str| panel["gridPos"][name].as_u64().context("no place");
        for (x, y) in (at("x")?..at("x")? + at("w")?).flat_map(|x| {
            let (y, h) = (at("y").unwrap_or(0), at("h").unwrap_or(0));
            (y..y + h).map(move |y| (x, y))
        }) {
            ensure!(x < 24 && cells.insert((x, y)), "{} overlaps another panel", panel["title"]);
        }
    }
    ensure!(ids.len() == panels.len(), "two panels have one number");
    Ok(())
}

#[test]
fn scrapers_that_hang_or_hurry_keep_nobody_from_being_fenced() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = serve(&bench, "path = \"/run/fence-xdp/metrics.sock\";")?;
    let used = server.process().processor_time()?;
    // Some send nothing, some the beginning of a head without an end, and some never read.
    let mut hung = Vec::new();
    for said in [&b""[..], b"GET /metrics HTTP/1.1\r\nX: ", b"GET /metrics HTTP/1.1\r\nHost: lab\r\n\r\n"].repeat(10) {
        // A full backlog makes `connect` wait, so it is not waited for.
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        if socket.connect(&socket2::SockAddr::unix(bench.hypervisor.outside(SOCKET))?).is_ok() {
            let _ = (&socket).write_all(said);
        }
        hung.push(socket);
    }
    for (op, code) in [("off", 0), ("status", 2), ("on", 0), ("status", 0)] {
        bench.expect_via(&server, &bench.about_domain(op), code, "kernel")?;
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", server.process().id()))?.count();
    ensure!(descriptors < 60, "it holds {descriptors} descriptors");
    // Their time runs out, and an honest scraper is served.
    let (head, _) = ask(&bench, &["GET /metrics HTTP/1.1"])?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    drop(hung);
    // A head without an end is cut off.
    let mut stream = connect(&bench)?;
    let sent = (0..64).try_for_each(|_| stream.write_all(&[b'x'; 4096]));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    ensure!(sent.is_err() || !answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    let used = server.process().processor_time()?.saturating_sub(used);
    ensure!(used < Duration::from_secs(2), "they cost {used:?} of processor time");
    Ok(())
}
