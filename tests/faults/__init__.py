"""What must not break a server, by number, and below each where it is shown that it does not.

 1  kill -9 under the load of 4 writers
      test_server::test_killed_at_any_moment_it_has_all_that_it_acknowledged
      test_kills::test_tokyo_cabinet_has_all_that_was_acknowledged_before_a_kill
      test_kills::test_a_tree_of_tokyo_cabinets_loses_only_what_came_after_its_last_sync
      ``script/soak``, with 200 kills for LMDB and 50 for Tokyo Cabinet
 2  a sync before each reply, one for many writes
      test_disk::test_with_sync_always_each_write_is_on_the_disk_before_its_reply_is_sent
      test_disk::test_with_sync_os_no_write_waits_for_the_disk
 3  a power cut
      test_disk::test_after_a_power_cut_at_any_moment_all_is_there_that_was_acknowledged
 4  kill -9 during start, growth of the map and backup
      test_kills::test_killed_at_any_step_of_its_start_its_commits_and_its_growth_the_file_opens_and_has_all
      test_kills::test_killed_while_its_map_grows_it_has_all_that_it_acknowledged
      test_kills::test_killed_at_any_step_of_a_copy_the_store_is_whole_and_what_has_the_copys_name_too
      ``script/soak start growth``
 5  several records at once, and additions, under kills
      test_kills::test_of_several_records_put_together_all_are_there_after_a_kill_or_none
      test_kills::test_additions_are_carried_out_once_however_often_the_server_is_killed
 6  a backup while others write
      test_disk::test_a_copy_made_while_others_write_has_what_was_written_up_to_one_moment
 7  a full disk
      test_disk::test_a_full_disk_fails_writes_only_loses_nothing_and_passes
      test_lmdb::test_a_disk_that_takes_no_more_is_an_outage_that_passes
 8  a full map
      test_lmdb::test_a_tiny_map_grows_and_loses_nothing
      test_lmdb::test_a_process_follows_the_map_that_another_has_grown
      test_lmdb::test_a_map_that_cannot_grow_is_an_outage_that_passes
 9  readers that were killed
      test_lmdb::test_killed_readers_do_not_make_the_file_grow
      test_lmdb::test_readers_that_were_killed_before_the_file_was_opened_do_not_either
10  no more files to open
      test_limits::test_without_files_to_open_it_serves_those_who_are_connected_and_later_all
      test_limits::test_without_files_to_open_it_says_so_and_waits_without_haste
11  frames that announce much
      test_crowds::test_what_is_announced_within_the_limit_takes_no_memory_before_it_comes
      test_crowds::test_what_is_announced_above_the_limit_is_refused_at_once_and_nothing_behind_it_is_executed
12  replies that nobody reads
      test_crowds::test_replies_that_nobody_reads_stay_within_the_limit_of_memory_and_are_given_up
13  slow senders
      test_crowds::test_a_request_has_one_deadline_however_many_bytes_come_of_it
14  idle connections
      test_crowds::test_idle_connections_cost_little_and_those_above_the_limit_are_refused_at_once
15  a peer that has vanished or hangs
      test_limits::test_a_peer_that_has_vanished_will_be_asked_within_two_minutes
      test_tyrant_store::test_a_server_that_hangs_holds_nobody_up_for_longer_than_the_deadline
16  replies cut at any byte
      test_client::test_an_answer_cut_at_any_byte_is_sent_for_again_or_its_outcome_is_unknown
      and all of test_cuts
17  replies that come late
      test_client::test_a_late_answer_never_reaches_a_later_call
18  frames in pieces, and ends
      test_server::test_a_thousand_requests_in_single_bytes_are_answered_in_order
      test_server::test_a_thousand_requests_in_one_packet_are_answered_in_order
      test_server::test_a_whole_request_before_the_end_is_executed_and_answered
      test_server::test_half_a_request_before_the_end_is_not
19  many threads with one pool
      test_client::test_threads_do_not_get_each_others_answers_and_the_pool_keeps_its_bound
      test_client::test_threads_whose_connections_keep_breaking_do_not_get_each_others_answers
20  forks
      test_client::test_a_forked_child_does_not_use_its_parents_connections
      test_client::test_a_child_forked_while_threads_hold_everything_can_still_call
      test_lmdb::test_forks_amid_the_work_of_threads_leave_both_sides_working
21  a restart under load
      test_kills::test_additions_are_carried_out_once_however_often_the_server_is_killed
      test_client::test_only_what_does_no_harm_is_sent_again_and_only_once
      test_sessions_under_fire::test_every_acknowledged_change_to_ones_own_key_is_there_at_the_end
22  SIGTERM and SIGHUP under load
      test_server::test_terminated_under_load_it_has_all_that_it_acknowledged
      test_signals::test_sighup_opens_the_log_anew_and_disturbs_nobody
23  frames of all kinds
      ``tests/fuzz``
24  a valid request behind a malformed one
      test_server::test_behind_a_malformed_request_nothing_is_executed
25  the same as the original, side by side
      not here: Debian has no ttserver; test_transcripts replays what one has answered
26  damaged files
      test_damage::test_a_damaged_file_is_an_error_or_data_and_never_a_hang
      test_lmdb::test_a_file_that_was_cut_short_is_an_error_and_not_the_end_of_the_process
      test_sealing::test_no_bit_of_the_text_can_be_flipped
27  a clock that jumps
      test_clock::test_a_servers_deadlines_do_not_notice_when_the_clock_jumps
      test_clock::test_sweeps_go_by_the_clock_of_the_moment_and_on_whatever_it_does
      test_clock::test_a_clock_that_is_set_back_logs_nobody_out_and_one_set_on_by_more_than_the_timeout_does
28  what is closed by default
      test_server::test_other_machines_are_kept_out_unless_that_is_asked_for, and all of test_mask
29  a day of mixed load
      ``script/soak mixed --minutes 1440``; in small
      test_soak::test_clients_that_know_what_must_be_there_find_it_and_leave_nothing_behind
30  kill -9 of a queue's consumers, and of its server
      test_fanned::test_every_consumer_sees_every_message_in_order_whoever_is_killed
      test_fanout::test_a_message_that_kills_its_consumers_ends_in_the_dead_letters
      ``script/soak fanout``, with 100,000 messages for 5 consumers

What needs a network of its own (packets dropped on the way, 15) or more than two cores (the latencies of 11 to 14 in
full size, see ``benchmarks.crowd``) is shown by what comes next to it. A clock that is set back sets the times in the
log back too (27): they are the wall clock's. With ``--sync os``, a power cut may damage the file (3), as the server
says when it starts.

The tests need root (a mount), and Debian's strace and faketime; ``script/test`` installs them.
"""
