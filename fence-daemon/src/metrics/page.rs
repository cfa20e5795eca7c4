//! The report of the control socket as metrics.
//!
//! Labels are bounded: by the configuration (listeners, URIs), by the code (verdicts, operations,
//! results, steps, states), or by the host (interfaces). Clients and domains are no labels.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use fence_common::ending::Ending;
use fence_common::verdict::Counters;
use fence_control::report::{Cluster, Health, Latency, Listener, Report};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text;
use prometheus_client::registry::{Registry, Unit};

use super::families::{Durations, Families, Labels};

/// The prefix of each name.
const PREFIX: &str = "fence_xdp";

/// The operations whose results are shown from the beginning: an increase from nothing is none to
/// Prometheus.
const ORDERS: [&str; 3] = ["off", "reboot", "on"];

/// The bounds of a histogram's buckets are powers of two, in microseconds, from 128 µs to 34 s. The
/// daemon's own histogram has bounds at just these.
const BOUNDS: std::ops::RangeInclusive<u32> = 7..=25;

/// The report as OpenMetrics text.
///
/// # Errors
/// None is expected: text is written to memory.
pub fn open_metrics(report: Arc<Report>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Figures(report)));
    let mut page = String::with_capacity(32 << 10);
    text::encode(&mut page, &registry)?;
    Ok(page)
}

/// OpenMetrics text in the older format of Prometheus, version 0.0.4. It knows neither units, nor
/// infos, nor an end, and names a counter as its sample is named.
#[must_use]
pub fn classic(open_metrics: &str) -> String {
    // The type comes after the help, whose name depends on it.
    let kinds: BTreeMap<&str, &str> =
        open_metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let mut page = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some("#"), Some(what @ ("TYPE" | "HELP")), Some(name), Some(rest)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            if !line.starts_with('#') {
                page.push_str(line);
                page.push('\n');
            }
            continue;
        };
        let (suffix, kind) = match kinds.get(name).copied() {
            Some("counter") => ("_total", "counter"),
            Some("info") => ("_info", "gauge"),
            other => ("", other.unwrap_or("untyped")),
        };
        let rest = if what == "TYPE" { kind } else { rest };
        let _ = writeln!(page, "# {what} {name}{suffix} {rest}");
    }
    page
}

#[derive(Debug)]
struct Figures(Arc<Report>);

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (report, mut families) = (&*self.0, Families(encoder));
        daemon(report, &mut families)?;
        listeners(report, &mut families)?;
        requests(report, &mut families)?;
        domains(report, &mut families)?;
        report.cluster.as_ref().map_or(Ok(()), |cluster| hosts(cluster, &mut families))
    }
}

fn daemon(report: &Report, families: &mut Families<'_>) -> fmt::Result {
    let version = vec![("version", report.daemon.version.clone())];
    families.info(("build", "The version of the daemon"), version)?;
    let started = report.daemon.now_unix_ms.saturating_sub(report.daemon.uptime_ms);
    let about = ("start_time", "When the daemon started, since 1970");
    families.gauge(about, Some(&Unit::Seconds), [(Vec::new(), seconds(started))])?;
    let health = [Health::Starting, Health::Serving, Health::Degraded, Health::Stopping];
    let states = health.map(|one| (vec![("state", one.name().to_owned())], flag(one == report.health)));
    families.gauge(("health", "1 for the daemon's state, 0 for the others"), None, states)?;
    let problems = [(Vec::new(), count(report.problems.len()))];
    families.gauge(("problems", "What is wrong, as fence-daemon status lists it"), None, problems)
}

fn listeners(report: &Report, families: &mut Families<'_>) -> fmt::Result {
    let up = report.listeners.iter().map(|one| (of_listener(one), flag(one.hears)));
    families.gauge(("listener_up", "Whether requests reach the daemon by the listener"), None, up)?;
    let wanted = report.listeners.iter().filter(|listener| listener.attach.as_deref() != Some("off"));
    let attached = wanted.flat_map(|listener| {
        listener.interfaces.iter().map(move |interface| {
            let mut labels = of_listener(listener);
            labels.push(("interface", interface.name.clone()));
            labels.push(("mode", interface.program.as_deref().map_or_else(|| "none".to_owned(), word)));
            (labels, flag(interface.program.is_some()))
        })
    });
    families.gauge(("program_attached", "Whether the kernel program is attached to the interface"), None, attached)?;
    let in_kernel = report
        .kernel
        .as_ref()
        .and_then(|kernel| kernel.counters.as_ref())
        .map(|counters| verdicts(counters, &[("path", "kernel".to_owned()), ("listener", "multicast".to_owned())]));
    let in_daemon = report.listeners.iter().flat_map(|listener| {
        let mut labels = vec![("path", "daemon".to_owned())];
        labels.append(&mut of_listener(listener));
        verdicts(&listener.counters, &labels)
    });
    let about = ("datagrams", "What was judged, by verdict: datagrams, and requests on connections and lines");
    families.counter(about, in_kernel.into_iter().flatten().chain(in_daemon))
}

/// Each counter of these, also those that are zero.
fn verdicts(counters: &BTreeMap<String, u64>, labels: &[(&'static str, String)]) -> Vec<(Labels, u64)> {
    let sample = |name: &str| {
        let mut labels = labels.to_vec();
        labels.push(("verdict", name.to_owned()));
        (labels, counters.get(name).copied().unwrap_or_default())
    };
    Counters::NAMES.into_iter().map(sample).collect()
}

fn requests(report: &Report, families: &mut Families<'_>) -> fmt::Result {
    // By listener (kind and name), operation and result.
    let mut results: BTreeMap<(&str, &str, &str, &str), u64> = BTreeMap::new();
    for listener in &report.listeners {
        let name = listener.name.as_deref().unwrap_or_default();
        for (op, ending) in ORDERS.iter().flat_map(|op| Ending::ALL.iter().map(move |ending| (op, ending))) {
            results.insert((&listener.kind, name, op, ending.name()), 0);
        }
    }
    for one in &report.requests.results {
        let key =
            (one.listener.as_str(), one.name.as_deref().unwrap_or_default(), one.op.as_str(), one.result.as_str());
        *results.entry(key).or_default() += one.count;
    }
    let results = results.into_iter().map(|((kind, name, op, result), count)| {
        let mut labels = listener_labels(kind, name);
        labels.push(("action", op.to_owned()));
        labels.push(("result", word(result)));
        (labels, count)
    });
    families.counter(("requests", "Requests that have ended, by their result"), results)?;
    let in_progress = u32::try_from(report.requests.in_progress).unwrap_or(u32::MAX);
    let about = ("requests_in_progress", "Requests that are being served");
    families.gauge(about, None, [(Vec::new(), f64::from(in_progress))])?;
    let copies = ("duplicates", "Copies of a request, signed anew by its client");
    families.counter(copies, [(Vec::new(), report.requests.duplicates)])?;
    let replays = ("replays", "Datagrams that had come before, bit for bit");
    families.counter(replays, [(Vec::new(), report.requests.replays)])?;
    let times = report.latency.iter().map(|one| {
        let labels = vec![("action", one.op.clone()), ("step", one.step.clone())];
        (labels, counts(one))
    });
    let about = ("request_duration", "From a request's arrival until it passed the step, of answered requests");
    families.histogram(about, times)?;
    let successes = report.requests.last_success_unix_ms.iter();
    let successes = successes.map(|(op, at)| (vec![("action", op.clone())], seconds(*at)));
    let about = ("last_success_timestamp", "When the action succeeded last, since 1970");
    families.gauge(about, Some(&Unit::Seconds), successes)
}

fn domains(report: &Report, families: &mut Families<'_>) -> fmt::Result {
    let up = report.uris.iter().map(|uri| (of_uri(&uri.uri), flag(uri.connected && !uri.silent)));
    families.gauge(("libvirt_up", "Whether libvirt is connected and answers"), None, up)?;
    let mut states: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for uri in &report.uris {
        for state in ["running", "shut off"] {
            states.insert((&uri.uri, state), 0);
        }
        for domain in &uri.domains {
            *states.entry((&uri.uri, &domain.state)).or_default() += 1;
        }
    }
    let states = states.into_iter().map(|((uri, state), number)| {
        let mut labels = of_uri(uri);
        labels.push(("state", word(state)));
        (labels, count(number))
    });
    families.gauge(("domains", "The domains that the daemon knows, by their state"), None, states)?;
    let orphaned = report.uris.iter().map(|uri| {
        let number = uri.domains.iter().filter(|domain| !domain.orphans.is_empty()).count();
        (of_uri(&uri.uri), count(number))
    });
    families.gauge(("orphaned_domains", "Domains that run on although libvirt has lost them"), None, orphaned)?;
    let (given_up, pending): (Vec<_>, Vec<_>) = report.restarts.iter().partition(|restart| restart.held);
    let restarts = [("pending", &pending), ("given_up", &given_up)]
        .map(|(state, list)| (vec![("state", state.to_owned())], count(list.len())));
    let about = ("restarts", "Rebooted domains that are still to be started; given_up: by hand");
    families.gauge(about, None, restarts)?;
    let late = pending.iter().map(|restart| restart.waiting_ms.saturating_sub(restart.pause_ms)).max();
    let about = ("restart_delay", "How long the oldest pending restart is late");
    families.gauge(about, Some(&Unit::Seconds), [(Vec::new(), seconds(late.unwrap_or_default()))])
}

fn hosts(cluster: &Cluster, families: &mut Families<'_>) -> fmt::Result {
    let about = ("cluster_joined", "Whether this host is in the group of corosync");
    families.gauge(about, None, [(Vec::new(), flag(cluster.joined))])?;
    let about = ("cluster_quorate", "Whether corosync has quorum here");
    families.gauge(about, None, [(Vec::new(), flag(cluster.quorate))])?;
    let labels = |node: u32, name: &Option<String>| {
        vec![("node_id", node.to_string()), ("node", name.clone().unwrap_or_default())]
    };
    let present = cluster.hosts.iter().map(|host| (labels(host.node, &host.name), flag(host.present)));
    families.gauge(("cluster_host_up", "Whether the host's daemon is in the group"), None, present)?;
    let agrees =
        |host: &fence_control::report::ClusterHost| Some((labels(host.node, &host.name), flag(host.key_agrees?)));
    let about = ("cluster_host_key_agrees", "Whether the host's messages are signed with a key of ours");
    families.gauge(about, None, cluster.hosts.iter().filter_map(agrees))
}

fn listener_labels(kind: &str, name: &str) -> Labels {
    vec![("listener", kind.to_owned()), ("name", name.to_owned())]
}

fn of_listener(listener: &Listener) -> Labels {
    listener_labels(&listener.kind, listener.name.as_deref().unwrap_or_default())
}

fn of_uri(uri: &str) -> Labels {
    vec![("uri", uri.to_owned())]
}

/// A text of several words as one, as labels have it.
fn word(text: &str) -> String {
    text.replace([' ', '-'], "_")
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Milliseconds in seconds.
fn seconds(millis: u64) -> f64 {
    std::time::Duration::from_millis(millis).as_secs_f64()
}

fn counts(latency: &Latency) -> Durations {
    let mut buckets: Vec<(f64, u64)> = Vec::new();
    let mut seen = 0;
    let below = |bound: u64| latency.buckets.iter().filter(|one| one.le_us < bound).map(|one| one.count).sum::<u64>();
    for exponent in BOUNDS {
        let bound = 1_u64 << exponent;
        let all = below(bound);
        buckets.push((std::time::Duration::from_micros(bound).as_secs_f64(), all - seen));
        seen = all;
    }
    buckets.push((f64::INFINITY, latency.count.saturating_sub(seen)));
    let sum = std::time::Duration::from_micros(latency.sum_us).as_secs_f64();
    Durations { sum, count: latency.count, buckets }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Report {
        fence_control::client::parse(include_str!("../../../docs/reference/status.example.json")).unwrap()
    }

    fn page(report: Report) -> String {
        open_metrics(Arc::new(report)).unwrap()
    }

    #[test]
    fn the_page_has_the_figures_of_the_report() {
        let page = page(example());
        for line in [
            "fence_xdp_requests_total{listener=\"multicast\",name=\"\",action=\"off\",result=\"success\"} 30",
            "fence_xdp_requests_total{listener=\"multicast\",name=\"\",action=\"list\",result=\"no_callback\"} 2",
            "fence_xdp_requests_total{listener=\"multicast\",name=\"\",action=\"reboot\",result=\"failure\"} 0",
            "fence_xdp_domains{uri=\"qemu:///system\",state=\"running\"} 2.0",
            "fence_xdp_domains{uri=\"qemu:///system\",state=\"shut_off\"} 1.0",
            "fence_xdp_orphaned_domains{uri=\"qemu:///system\"} 1.0",
            "fence_xdp_libvirt_up{uri=\"lxc:///system\"} 0.0",
            "fence_xdp_restarts{state=\"pending\"} 1.0",
            "fence_xdp_restarts{state=\"given_up\"} 0.0",
            "fence_xdp_last_success_timestamp_seconds{action=\"off\"} 1763780341.006",
            "fence_xdp_request_duration_seconds_sum{action=\"off\",step=\"replied\"} 0.129004",
            "fence_xdp_request_duration_seconds_count{action=\"off\",step=\"replied\"} 30",
            "fence_xdp_request_duration_seconds_bucket{le=\"0.002048\",action=\"off\",step=\"replied\"} 0",
            "fence_xdp_request_duration_seconds_bucket{le=\"0.004096\",action=\"off\",step=\"replied\"} 28",
            "fence_xdp_request_duration_seconds_bucket{le=\"0.032768\",action=\"off\",step=\"replied\"} 30",
            "fence_xdp_request_duration_seconds_bucket{le=\"+Inf\",action=\"off\",step=\"replied\"} 30",
            "fence_xdp_cluster_host_up{node_id=\"3\",node=\"\"} 0.0",
            "# TYPE fence_xdp_requests counter",
            "# UNIT fence_xdp_request_duration_seconds seconds",
            "# EOF",
        ] {
            assert!(page.lines().any(|there| there == line), "no {line} in\n{page}");
        }
    }

    #[test]
    fn what_a_histogram_counts_is_complete_and_cumulative() {
        let report = example();
        for latency in &report.latency {
            let counts = counts(latency);
            assert_eq!(counts.buckets.iter().map(|(_, count)| count).sum::<u64>(), latency.count);
            assert_eq!(counts.count, latency.count);
        }
    }

    #[test]
    fn the_older_format_has_the_same_samples_and_other_comments() {
        let open = page(example());
        let classic = classic(&open);
        let samples =
            |page: &str| page.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(samples(&open), samples(&classic));
        for line in ["# TYPE fence_xdp_requests_total counter", "# TYPE fence_xdp_build_info gauge"] {
            assert!(classic.lines().any(|there| there == line), "no {line} in\n{classic}");
        }
        assert!(classic.contains("# HELP fence_xdp_requests_total Requests that"), "{classic}");
        assert!(!classic.contains("# UNIT") && !classic.contains("# EOF"), "{classic}");
    }

    #[test]
    fn no_text_from_outside_breaks_a_line() {
        let mut report = example();
        report.uris[0].uri = "a\\b\"c\nd".to_owned();
        let page = page(report);
        assert!(page.contains("fence_xdp_libvirt_up{uri=\"a\\\\b\\\"c\\nd\"} 1.0"), "{page}");
    }

    #[test]
    fn the_reference_names_each_metric_and_no_other() {
        let reference = include_str!("../../../docs/reference/metrics.md");
        let classic = classic(&page(example()));
        let shown: std::collections::BTreeSet<_> =
            classic.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let rows = reference.lines().filter_map(|line| line.strip_prefix("| `fence_xdp_"));
        let named: Vec<_> =
            rows.map(|row| format!("fence_xdp_{}", row.split('`').next().unwrap_or_default())).collect();
        assert_eq!(named.iter().map(String::as_str).collect::<std::collections::BTreeSet<_>>(), shown);
    }
}
