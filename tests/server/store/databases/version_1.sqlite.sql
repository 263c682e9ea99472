BEGIN TRANSACTION;
CREATE TABLE embeddings (
	"key" VARCHAR(128) NOT NULL, 
	model VARCHAR(128) NOT NULL, 
	vector BLOB NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY ("key", model)
);
INSERT INTO "embeddings" VALUES('img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'36D7DEBE9E189B3F479BAC3F361F74BFF3F78ABCB294613F6F640A3FDD66623FB278A83D4E78663F164259BF25C598BE5D785DBE2580FFBFD6D24EBE800B4DBFEA39AA3FC65E33BFB2BE30BF5D4A5BBF5A155BBF537AD53E11B10BBEDAF64ABE5EED7BBF633896BD9A59FCBE174AAF3F86E19EBEED88833F285D333F51D22D3E',1.79576307686466217e+09);
INSERT INTO "embeddings" VALUES('img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'AE6630BDCED7203FC22FE73F4E913DBFD27186BE72EF81BEC64F9ABE5A6D683FD3EF523E2000C13F85ECFEBEDA728CBE7E34F33E909891BF232F67BCB0E074BF0ECE913F003D59BF559BD5BE13488DBEDE2AB9BF702E55BFCD9A4ABE9642613E3621B7BE9A53803FD36288BF467A783FDA830CBE5C0BA43F629D303FADD07EBF',1.79576307686466217e+09);
INSERT INTO "embeddings" VALUES('img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'BB2B333E38B68FBF42B9D0BE674422BFDB819EBECA5BDABFA8122CBF2E18D2BEC563B1BE688E6DBFFE44A13F0BBD013FB54255BF62F3983FB231E83DC016A83FE56C1B3FA5559D3EF39BE2BEA1E7233F803FD2BDF6A1863F90C18E3E43B2E43E9D01E0BEA6463B3F95711A3FD33D103F0BB378BF5D5BF9BD2CB0A83F03C1CEBF',1.79576307686466217e+09);
INSERT INTO "embeddings" VALUES('img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'8103043F32E3A4BF799090BEA627B8BE5CD59ABE5A8704C0B5BE74BF96D3EEBEAEAF1EBEF0DFEFBE5EE9993FAEEAE73E08B567BEE36ECD3F83DC223E66106A3FF21C913E05C87F3E63A1C6BC46F0623F009151BEBE819D3D28BE5D3E3A99083F1D7D013E3B26973F80D7533E9A11F23DC7244BBF84CA18BEE32B863F205EFEBF',1.79576307686466217e+09);
INSERT INTO "embeddings" VALUES('img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'CB18A13EDA709F3DA019EFBF525D8CBD7E1D343FDD63243F721B8A3F8DA170BF8EC5983C60CCAEBFE80410BE3FDD843EFEF042BFE0AE753EE675C8BE9A0FA63E462295BEF3A73C3FD48C0B3FCE884DBE1E88E13FE35BAE3F36AB9D3E38872EBF5AC381BD4D0DA0BF8D05843F6D241DBE78865BBF3F4DB1BF6AF35C3EDED8653F',1.79576307686466217e+09);
INSERT INTO "embeddings" VALUES('img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',X'0A55FC3E02648FBF62E5BCBF7E033BBEB480063ED150A3BF46C24BBEEA427ABF761E4EBED0ECB2BF52D6833F50E40C3F43273BBF6353CC3FD85460BD837E963F388AD6BD61AB383FA0A0773ECD202B3F1B5E6C3F85F4803F48E4BE3E9AEA9B3D7E43963D16A7CD3DE021683FCA1C06BE56587FBF0AF17FBFB6E3573F7E6F6EBF',1.79576307686466217e+09);
CREATE TABLE evaluation_cells (
	evaluation_id VARCHAR(64) NOT NULL, 
	place INTEGER NOT NULL, 
	result JSON NOT NULL, 
	PRIMARY KEY (evaluation_id, place), 
	FOREIGN KEY(evaluation_id) REFERENCES evaluations (id) ON DELETE CASCADE
);
INSERT INTO "evaluation_cells" VALUES('eval_01a21bd1f3d7bbb20b5396a64513',0,'{"strategy": "random", "k": 1, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5220996671549727, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.855433000488306, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1400540984362284, "nll": 2.5321317883608288, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8296268252190021, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8296268252190022}, {"threshold": 0.8282812944426949, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289540598308487}, {"threshold": 0.8277604527822513, "coverage": 0.5, "accuracy": 0.6666666666666666, "confidence": 0.8285561908146496}, {"threshold": 0.8277559046214812, "coverage": 0.6666666666666666, "accuracy": 0.5, "confidence": 0.8283561192663575}, {"threshold": 0.8277317222957882, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8282312398722438}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8280815705025518}], "cost": {"prompt_tokens": 28.0, "cached_tokens": 10.666666666666666, "media": 2.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.2726985089993832, "p90_seconds": 0.40203138000106264}, "error": null}');
INSERT INTO "evaluation_cells" VALUES('eval_01a21bd1f3d7bbb20b5396a64513',1,'{"strategy": "rices_image", "k": 1, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5221074947905571, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.8554408281238904, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1402331042355138, "nll": 2.532427342499778, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8297954632151362, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8297954632151363}, {"threshold": 0.8280854626962962, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289404629557163}, {"threshold": 0.827946921560417, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8286092824906165}, {"threshold": 0.8277317222957882, "coverage": 0.6666666666666666, "accuracy": 0.25, "confidence": 0.8283898924419095}, {"threshold": 0.8276350640191874, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8282389267573651}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8280915387389925}], "cost": {"prompt_tokens": 27.333333333333332, "cached_tokens": 9.333333333333334, "media": 2.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.3796100599993224, "p90_seconds": 0.4192972325017763}, "error": null}');
INSERT INTO "evaluation_cells" VALUES('eval_01a21bd1f3d7bbb20b5396a64513',2,'{"strategy": "random", "k": 2, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5220499485602923, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.8553832818936257, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.139976192814151, "nll": 2.530970124997744, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8296386424646669, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.829638642464667}, {"threshold": 0.8282958512018705, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289672468332688}, {"threshold": 0.8276802684858946, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8285382540508107}, {"threshold": 0.8276665884748262, "coverage": 0.6666666666666666, "accuracy": 0.5, "confidence": 0.8283203376568147}, {"threshold": 0.8276484830420333, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8281859667338584}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.828023220510704}], "cost": {"prompt_tokens": 44.0, "cached_tokens": 30.0, "media": 3.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.011205822498595808, "p90_seconds": 0.28852744449977763}, "error": null}');
INSERT INTO "evaluation_cells" VALUES('eval_01a21bd1f3d7bbb20b5396a64513',3,'{"strategy": "rices_image", "k": 2, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5222171727138407, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.855550506047174, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1401225826470565, "nll": 2.531471914916587, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8297987435879427, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8297987435879428}, {"threshold": 0.8287639604146436, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8292813520012933}, {"threshold": 0.8278329685700895, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8287985575242254}, {"threshold": 0.8277805830894429, "coverage": 0.6666666666666666, "accuracy": 0.25, "confidence": 0.8285440639155298}, {"threshold": 0.827659325666562, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8283671162657363}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8281962467802849}], "cost": {"prompt_tokens": 44.166666666666664, "cached_tokens": 21.333333333333332, "media": 3.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.011107950000223354, "p90_seconds": 0.014939127000616281}, "error": null}');
CREATE TABLE evaluations (
	id VARCHAR(64) NOT NULL, 
	support_set VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	"plan" JSON NOT NULL, 
	queries_done INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	finished_at DOUBLE, 
	error JSON, 
	holder VARCHAR(64) NOT NULL, 
	held_until DOUBLE NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "evaluations" VALUES('eval_01a21bd1f3d7bbb20b5396a64513','ss_01a21bd1bc6a9cc2b20fb1c54cd2',3,'completed','{"request": {"k": [1, 2]}, "settled": {"template": "classification", "order": null, "candidates": [{"label": "red", "text": "red", "param": "candidates[0]"}, {"label": "green", "text": "green", "param": "candidates[1]"}, {"label": "blue", "text": "blue", "param": "candidates[2]"}], "weighing": {"normalisation": "sum", "calibration": "none", "content_free": "grey", "permutations": 1, "seed": 0}, "cells": [{"strategy": "random", "k": 1, "seed": 0, "method": "in_context", "control": null}, {"strategy": "rices_image", "k": 1, "seed": 0, "method": "in_context", "control": null}, {"strategy": "random", "k": 2, "seed": 0, "method": "in_context", "control": null}, {"strategy": "rices_image", "k": 2, "seed": 0, "method": "in_context", "control": null}], "queries": ["e0", "e1", "e2", "e3", "e4", "e6"]}, "truths": ["red", "red", "green", "green", "blue", "green"], "num_examples": 6, "prior": "nearest_mean", "single": ["blue"]}',24,1.79576307400679326e+09,1.79576307402099633e+09,1.7957630798682518e+09,'null','8fdc40f2885a407b93b216473081416c',0.0);
CREATE TABLE example_media (
	row_id INTEGER NOT NULL, 
	place INTEGER NOT NULL, 
	media_id VARCHAR(80) NOT NULL, 
	PRIMARY KEY (row_id, place), 
	FOREIGN KEY(row_id) REFERENCES examples (row_id) ON DELETE CASCADE, 
	FOREIGN KEY(media_id) REFERENCES media (media_id)
);
INSERT INTO "example_media" VALUES(1,0,'img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5');
INSERT INTO "example_media" VALUES(2,0,'img_a312ce06f8477129b34decd03786e9b9a637025413663ffc6f52dc685b059c90');
INSERT INTO "example_media" VALUES(3,0,'img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60');
INSERT INTO "example_media" VALUES(4,0,'img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c');
INSERT INTO "example_media" VALUES(5,0,'img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9');
INSERT INTO "example_media" VALUES(6,0,'img_ee61c1e17a4b741b4b776363bba5e2a336ec74bddd953f97d6495478aef23cf2');
INSERT INTO "example_media" VALUES(7,0,'img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc');
INSERT INTO "example_media" VALUES(8,0,'img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97');
INSERT INTO "example_media" VALUES(9,0,'img_d0516f5aa3ac5dd710f0c9eb0868b30269739e9916dc64e17138cb48bfe07c57');
CREATE TABLE examples (
	row_id INTEGER NOT NULL, 
	set_id VARCHAR(64) NOT NULL, 
	example_id VARCHAR(128) NOT NULL, 
	place INTEGER NOT NULL, 
	first_version INTEGER NOT NULL, 
	end_version INTEGER, 
	text VARCHAR NOT NULL, 
	question VARCHAR NOT NULL, 
	label VARCHAR NOT NULL, 
	metadata JSON NOT NULL, 
	PRIMARY KEY (row_id), 
	FOREIGN KEY(set_id) REFERENCES support_sets (id) ON DELETE CASCADE
);
INSERT INTO "examples" VALUES(1,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e0',0,1,NULL,'','','red','{"n": 0}');
INSERT INTO "examples" VALUES(2,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e1',1,1,2,'','','red','{"n": 1}');
INSERT INTO "examples" VALUES(3,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e2',2,1,NULL,'','','green','{"n": 2}');
INSERT INTO "examples" VALUES(4,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e3',3,1,NULL,'','','green','{"n": 3}');
INSERT INTO "examples" VALUES(5,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e4',4,1,NULL,'','','blue','{"n": 4}');
INSERT INTO "examples" VALUES(6,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e5',5,1,3,'','','blue','{"n": 5}');
INSERT INTO "examples" VALUES(7,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e1',1,2,NULL,'','','red','{}');
INSERT INTO "examples" VALUES(8,'ss_01a21bd1bc6a9cc2b20fb1c54cd2','e6',7,2,NULL,'','','green','{}');
INSERT INTO "examples" VALUES(9,'ss_01a21bd1c1810866c15e13924be0','a',0,1,NULL,'a text alone','','','{}');
CREATE TABLE first_answers (
	scope VARCHAR(64) NOT NULL, 
	"key" VARCHAR(256) NOT NULL, 
	request_digest VARCHAR(64) NOT NULL, 
	answer JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (scope, "key")
);
INSERT INTO "first_answers" VALUES('','create-colours','10a39b0af861977e8b39a72c91646bcca8d928e7795401765e909226d30a4c97','{"id": "ss_01a21bd1bc6a9cc2b20fb1c54cd2", "name": "colours", "version": 1, "latest_version": 1, "created_at": 1795763060.9262254, "updated_at": 1795763060.9262254, "expires_at": null, "is_pinned": false, "metadata": {"owner": "tests"}, "num_examples": 6, "num_media": 6, "num_bytes": 456, "label_counts": {"red": 2, "green": 2, "blue": 2}, "example_ids": ["e0", "e1", "e2", "e3", "e4", "e5"]}',1.79576306092622542e+09);
CREATE TABLE fits (
	set_id VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	method VARCHAR(32) NOT NULL, 
	model VARCHAR(128) NOT NULL, 
	format INTEGER NOT NULL, 
	arrays BLOB NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (set_id, version, method, model, format), 
	FOREIGN KEY(set_id, version) REFERENCES support_set_versions (set_id, version) ON DELETE CASCADE
);
INSERT INTO "fits" VALUES('ss_01a21bd1bc6a9cc2b20fb1c54cd2',3,'linear','c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits',1,X'98000000000000007B22706172616D65746572732E62696173223A7B226474797065223A22463634222C227368617065223A5B335D2C22646174615F6F666673657473223A5B302C32345D7D2C22706172616D65746572732E77656967687473223A7B226474797065223A22463634222C227368617065223A5B332C33325D2C22646174615F6F666673657473223A5B32342C3739325D7D7D20202020202020DA8C2C757FBFD73F47900C86ACDCC8BF85884C6452A2C6BF6C70DFDE413CCFBFEA207941E73AE43FA80F124F2D22F23F1144B84BC62DCFBF7F6CD027093DC2BF62AD89609DDBD93F0A1B8F2BB22F573FD0F7FFB73F79E53F291C5C5839D1BB3FF5748115F41BEE3FA40A97E76F8CE0BFB36173A0CFBFD1BFBF7E1698E685D43F33BEC2334749F0BF4CD8FAAD84627D3F470D8F101B90E5BF2433E891F1A2DF3F71DCE4B5B455E1BF76245E485B7DD3BF9B2C35622C50D7BFC533CFB1B956EABFBB11F50FEEE4DEBF6DBC02F09B0CC8BFE6C15334628DA53FA1235858196DCFBF7403A4E39317D03FFC0D75EB1C16E4BFF678D4B80D95DD3FE2008EED953FD13F3871C162A8E4E93F90ADE9BADE9C4B3FB40D23720D5B983F2E15607316AEC63FF98A39091B79F0BF5838DA3455A6C6BFA1FF46A5699996BFAFC88732CA84D5BF39D116E2D481F6BFE196F3D97D7BEABFB36BFCD89C89D1BF0741B79C8EECCABF8C211DB49779DBBF08C472F5B2CDEF3F1977A39402B3D33F29003B41CCAEC5BF285C0C0D8B07F43F22419FE85252CC3F4F374FF45CEEEB3F9179172ED6E795BF621C48E58DD2C93FA4C90D0A07B3C1BF4A1958309F21E63F3D5E7A458E65CEBF49075AC69BF1AC3FC5B2B286A8BFBE3F3487596F6EFEDE3F37C9AAABE0B4BD3F63E9F8DA9B90E83F874D81A66210CA3F9EFA82FF336ABABF067003CE267ECCBFDBA3F6B8C2F9A6BF307B034E5EFDDC3FEE5A5E1AEA39F3BFB0B6FED6561CB13FFFE9F3A19D6ED93F5091ED50C59AEEBF019230C07900D13FF7FE6FC64EA3DE3FDE65F489ED0AF03F56CFDD00E66FEA3F08840397E268D9BFDF6512E1E307BA3F3DE4723B285FE0BFBC72B71B8682DEBFB15501432F339FBF6FFDF1EE005DC3BF76EF4CCA1EF2CDBFEC170F0E673DCDBFFEA7008F0779C9BF95BB062F7444DEBFC3AA257922C2D53F540965CDDE56DC3FF0057BFE11F3D4BFB3E596A10EF8F03FE6D02997BA46DB3F35C652598F59B13FBCFFF15A0DD8E0BF0DBF8202A992C03F8F7565E6324EF0BF4C75A9830824DB3F57BAF3B880FAD6BF944762341404A8BF0A0732370C75E8BFFDEF60BD2C0BDDBFB7CE95E47DD8F23F',1.79576308230549097e+09);
CREATE TABLE media (
	media_id VARCHAR(80) NOT NULL, 
	num_bytes BIGINT NOT NULL, 
	is_uploaded BOOLEAN NOT NULL, 
	PRIMARY KEY (media_id)
);
INSERT INTO "media" VALUES('img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c',76,0);
INSERT INTO "media" VALUES('img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60',76,0);
INSERT INTO "media" VALUES('img_a312ce06f8477129b34decd03786e9b9a637025413663ffc6f52dc685b059c90',75,0);
INSERT INTO "media" VALUES('img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5',75,0);
INSERT INTO "media" VALUES('img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9',77,0);
INSERT INTO "media" VALUES('img_ee61c1e17a4b741b4b776363bba5e2a336ec74bddd953f97d6495478aef23cf2',77,0);
INSERT INTO "media" VALUES('img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97',77,0);
INSERT INTO "media" VALUES('img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc',76,0);
INSERT INTO "media" VALUES('img_fcee7bafe9a5a41f3f434cd63850dacaac9e767f00b30e87ad19f1ce7d987200',78,1);
INSERT INTO "media" VALUES('img_d0516f5aa3ac5dd710f0c9eb0868b30269739e9916dc64e17138cb48bfe07c57',69,0);
CREATE TABLE media_leases (
	holder VARCHAR(64) NOT NULL, 
	media_id VARCHAR(80) NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	PRIMARY KEY (holder, media_id), 
	FOREIGN KEY(media_id) REFERENCES media (media_id)
);
CREATE TABLE schema_version (
	id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "schema_version" VALUES(1,1);
CREATE TABLE support_set_versions (
	set_id VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	num_examples INTEGER NOT NULL, 
	num_added INTEGER NOT NULL, 
	num_replaced INTEGER NOT NULL, 
	num_removed INTEGER NOT NULL, 
	PRIMARY KEY (set_id, version), 
	FOREIGN KEY(set_id) REFERENCES support_sets (id) ON DELETE CASCADE
);
INSERT INTO "support_set_versions" VALUES('ss_01a21bd1bc6a9cc2b20fb1c54cd2',1,1.79576306092622542e+09,6,6,0,0);
INSERT INTO "support_set_versions" VALUES('ss_01a21bd1bc6a9cc2b20fb1c54cd2',2,1.79576306099512171e+09,7,1,1,0);
INSERT INTO "support_set_versions" VALUES('ss_01a21bd1bc6a9cc2b20fb1c54cd2',3,1.79576306103085088e+09,6,0,0,1);
INSERT INTO "support_set_versions" VALUES('ss_01a21bd1c1810866c15e13924be0',1,1.79576306113637065e+09,1,1,0,0);
CREATE TABLE support_sets (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(128), 
	version INTEGER NOT NULL, 
	created_at DOUBLE NOT NULL, 
	updated_at DOUBLE NOT NULL, 
	expires_at DOUBLE, 
	is_pinned BOOLEAN NOT NULL, 
	next_place INTEGER NOT NULL, 
	metadata JSON NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "support_sets" VALUES('ss_01a21bd1bc6a9cc2b20fb1c54cd2','colours',3,1.79576306092622542e+09,1.79576306103085088e+09,NULL,0,8,'{"owner": "tests"}');
INSERT INTO "support_sets" VALUES('ss_01a21bd1c1810866c15e13924be0',NULL,1,1.79576306113637065e+09,1.79576306113637065e+09,NULL,0,1,'{}');
CREATE INDEX ix_support_sets_expires_at ON support_sets (expires_at);
CREATE INDEX ix_first_answers_created_at ON first_answers (created_at);
CREATE INDEX ix_embeddings_created_at ON embeddings (created_at);
CREATE INDEX ix_evaluations_status ON evaluations (status);
CREATE INDEX ix_evaluations_support_set ON evaluations (support_set);
CREATE INDEX ix_examples_by_place ON examples (set_id, place);
CREATE UNIQUE INDEX ix_examples_by_id ON examples (set_id, example_id, first_version);
CREATE INDEX ix_media_leases_media_id ON media_leases (media_id);
CREATE INDEX ix_example_media_by_media ON example_media (media_id);
CREATE INDEX ix_fits_created_at ON fits (created_at);
COMMIT;
